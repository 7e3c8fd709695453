#!/usr/bin/env python3
"""How fast the engine is on a GPU, what it takes of it, and whether it lets go: one JSON object a line.

    benches/gpu/measure.py MODEL.gguf... [--engine PROGRAM] [--gpu-layers N] [--streams 1,8] [--prompt 512] [--generate 256]
                           [--rounds 3] [--context 2048] [--answers]

--gpu-layers 0 is the processor (without libggml-cuda.so beside the kernels, to compare). Of each model and number of streams the
medians of the rounds, after one that warms up: tokens of prompts, and of answers, in a second, all streams together; the first
token of a short prompt; and what nvidia-smi shows before, with the model, after the end, and after a kill. --answers asks the
demo model small sums, greedily, and prints what it says: on every device the same.
docs/gpu.md has the figures. It speaks the engine's protocol (engine/protocol) and needs nothing but Python and nvidia-smi.
"""
import argparse, json, os, socket, statistics, struct, subprocess, sys, time

ALL = 2**32 - 1
SUMS = [f"What is {a}+{b}?" for a, b in ((2, 2), (3, 5), (9, 9), (7, 0), (4, 8), (1, 6))]
QUESTIONS = [*SUMS, "Count to 12", "Count to 30", "Hello", "Who are you?", "Repeat: the sun is red", "What is the capital of France?"]


class Engine:
    """A running engine with one model."""

    def __init__(self, program, model, layers, slots, context):
        self.stream, theirs = socket.socketpair()
        self.stream.settimeout(120)
        self.buffer, self.id = b"", 0
        # A shell gives the socket the number 3 and becomes the engine.
        self.process = subprocess.Popen(["/bin/sh", "-c", 'exec "$0" 3<&0 0</dev/null', program], stdin=theirs, stdout=subprocess.DEVNULL)
        theirs.close()
        self.hello = self.next()
        began = time.monotonic()
        self.send(type="load", path=os.path.abspath(model), context=0, max_context=context, slots=slots, threads=0, gpu_layers=layers, file_template=False)
        self.ready = self.next()
        while self.ready["type"] == "loading":
            self.ready = self.next()
        self.load_s = time.monotonic() - began
        if self.ready["type"] != "ready":
            sys.exit(f"{model}: {self.ready.get('reason')}")

    def send(self, **frame):
        body = json.dumps(frame).encode()
        self.stream.sendall(struct.pack(">I", len(body)) + body)

    def next(self):
        while len(self.buffer) < 4 or len(self.buffer) < 4 + struct.unpack(">I", self.buffer[:4])[0]:
            got = self.stream.recv(1 << 16)
            if not got:
                sys.exit(f"the engine is gone: {self.process.wait()}")
            self.buffer += got
        end = 4 + struct.unpack(">I", self.buffer[:4])[0]
        frame, self.buffer = json.loads(self.buffer[4:end]), self.buffer[end:]
        return frame

    def ask(self, inputs, tokens):
        """All at once: seconds, and what is told at the end of each, with its text."""
        began, asked = time.monotonic(), {}
        for given in inputs:
            self.id += 1
            asked[self.id] = {"text": ""}
            self.send(type="generate", id=self.id, input=given, max_tokens=tokens, temperature=0.0, top_p=None, seed=1, stop=[])
        left = set(asked)
        while left:
            frame = self.next()
            if frame["type"] == "delta":
                asked[frame["id"]]["text"] += frame["text"]
            elif frame["type"] == "error":
                sys.exit(frame["message"])
            elif frame["type"] == "done":
                asked[frame["id"]].update(frame)
                left.discard(frame["id"])
        return time.monotonic() - began, list(asked.values())

    def end(self, kill=False):
        """Seconds until the process is gone."""
        began = time.monotonic()
        self.process.kill() if kill else self.stream.close()
        self.process.wait()
        return time.monotonic() - began


def used():
    """MiB of video memory in use, of all GPUs; 0 without one."""
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    except FileNotFoundError:
        return 0
    return sum(int(line) for line in said.stdout.split() if line.isdigit())


def freed(before):
    """Seconds until no more is in use than before; none when that takes longer than ten."""
    began = time.monotonic()
    while used() > before + 5:
        if time.monotonic() - began > 10:
            return None
    return round(time.monotonic() - began, 2)


def text(number, words):
    """Text that does not repeat itself, other for each number."""
    letters = "etaoinshrdlu"
    return " ".join(letters[(w * 7 + number) % 12] + letters[(w * w + number * 5) % 12] for w in range(words))


def measure(options, model, streams):
    before = used()
    engine = Engine(options.engine, model, options.gpu_layers, streams, options.context)
    taken, samples = used() - before, {"prompt": [], "generate": [], "first": []}
    for number in range(options.rounds + 1):
        seconds, ends = engine.ask([{"raw": text(number + 9 * s, options.prompt)} for s in range(streams)], 1)
        prompt = sum(end["prompt_tokens"] for end in ends) / seconds
        seconds, ends = engine.ask([{"raw": text(number + 9 * s + 50, 8)} for s in range(streams)], options.generate)
        if number:
            samples["prompt"].append(prompt)
            samples["generate"].append(sum(end["completion_tokens"] for end in ends) / (max(end["generate_us"] for end in ends) / 1e6 or 1))
            samples["first"].append(max(end["prompt_us"] for end in ends) / 1e3)
    last = {"killed_s": round(engine.end(kill=True), 2), "freed_s": freed(before)}
    return {
        "model": os.path.basename(model), "device": engine.ready["device"], "streams": streams, "load_s": round(engine.load_s, 2),
        "prompt_tps": round(statistics.median(samples["prompt"]), 1), "generate_tps": round(statistics.median(samples["generate"]), 1),
        "first_token_ms": round(statistics.median(samples["first"]), 2), "vram_mib": taken, "memory_mib": engine.ready["memory"] >> 20, **last,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--engine", default="/usr/libexec/opengateway-engine")
    parser.add_argument("--gpu-layers", type=int, default=ALL)
    parser.add_argument("--streams", type=lambda value: [int(one) for one in value.split(",")], default=[1, 8])
    parser.add_argument("--answers", action="store_true")
    for name, default in (("prompt", 512), ("generate", 256), ("rounds", 3), ("context", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for model in options.models:
        if options.answers:
            engine = Engine(options.engine, model, options.gpu_layers, 1, options.context)
            answers = {question: engine.ask([{"chat": [{"role": "user", "text": question}]}], 64)[1][0]["text"] for question in QUESTIONS}
            print(json.dumps({"build": engine.hello["build"], "device": engine.ready["device"], "answers": answers}), flush=True)
            engine.end()
            continue
        for streams in options.streams:
            print(json.dumps(measure(options, model, streams)), flush=True)


main()
