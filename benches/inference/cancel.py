"""Who asked is gone: how long until the slot is free, at every hop.

A slot of the stub is free when its `/open` counts no prompt. A slot of the engine is free when the next prompt, asked at once
behind the one that was given up, has its first text: the node has one slot, so that it waits for exactly that. This counts the
next prompt's own time too, and is an upper bound."""
import contextlib
import http.client
import json
import os
import signal
import subprocess
import time

from servers import say, until

LIMIT = 1.0
# What takes longer has failed, and is told with this value.
PATIENCE = 10.0


class Asked:
    """A prompt that is being answered, and a way to leave it."""

    def __init__(self, node, model, words=4, tokens=900):
        self.response = None
        self.connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
        body = {"model": model, "stream": True, "max_tokens": tokens, "temperature": 0}
        text = " ".join(f"{chr(97 + at % 26)}{chr(97 + at // 26 % 26)}" for at in range(words))
        body["messages"] = [{"role": "user", "content": text}]
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})

    def first_text(self):
        """Waits for the first text, or the end."""
        response = self.response = self.connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:300]}")
        while line := response.readline():
            if b'"content":"' in line and b'"content":""' not in line:
                return
            if line.startswith(b"data: [DONE]") or b'"finish_reason":"' in line:
                return

    def leave(self):
        # The response holds the socket too.
        if self.response:
            self.response.close()
        self.connection.close()


def asking_ogctl(node, model, text="hello"):
    argv = node.argv("prompt", "--model", model, "--max-tokens", "900", "--raw", text)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def by_http(node, model, wait, **options):
    asked = Asked(node, model, **options)
    wait(asked.first_text)
    yield asked.leave
    asked.leave()


@contextlib.contextmanager
def by_ogctl(node, model, wait, how, **_):
    process = asking_ogctl(node, model)
    wait(lambda: os.read(process.stdout.fileno(), 1))

    def leave():
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()

    yield leave
    process.kill()
    process.wait()


class Cancel:
    """Tries every way of leaving on every way of asking."""

    def __init__(self, options):
        self.tries = 3 if options.quick else 10

    def ways(self):
        yield "closed HTTP connection", by_http, {}
        yield "ogctl Ctrl-C", by_ogctl, {"how": "Ctrl-C"}
        yield "ogctl closed pipe", by_ogctl, {"how": "closed pipe"}

    def upstream(self, endpoint, figures):
        """The stub's open requests, asked at the node beside it and at another one, before and after the first text."""
        stub = endpoint.stub
        worst = {}
        for hop, node in (("same node", endpoint.targets["opengateway"]), ("over a peer", endpoint.targets["opengateway-hop"])):
            for way, ask, options in self.ways():
                for model in ("slow", "silent"):
                    said = "answering" if model == "slow" else "before any text"
                    wait = (lambda first: first()) if model == "slow" else (lambda first: until(lambda: stub.open() == 1, 10, "the stub is asked"))
                    times = []
                    for _ in range(self.tries):
                        with ask(node, model, wait, **options) as leave:
                            begun = time.monotonic()
                            leave()
                            with contextlib.suppress(RuntimeError):
                                until(lambda: stub.open() == 0, PATIENCE, "the stub's request ended")
                            times.append(time.monotonic() - begun)
                        until(lambda: stub.open() == 0, 90, "the stub is idle")
                    self.note(worst, f"{hop}, {way}, {said}", times)
        self.report(figures, "server behind the endpoint", worst)

    def engine(self, engine, model, figures):
        """The engine's one slot, in the middle of an answer and in the middle of a long prompt."""
        worst, own = {}, []
        for _ in range(self.tries):
            begun = time.monotonic()
            self.next(engine.a, model)
            own.append(time.monotonic() - begun)
        figures.also["cancel_next_prompt_alone_s"] = round(max(own), 3)
        for hop, node in (("same node", engine.a), ("over a peer", engine.c)):
            for way, ask, options in self.ways():
                self.note(worst, f"{hop}, {way}, answering", self.slot(engine, node, model, ask, lambda first: first(), options))
            # A prompt of seconds: half a second of it is computed when its asker leaves.
            times = self.slot(engine, node, model, by_http, lambda _: time.sleep(0.5), {"words": 400})
            self.note(worst, f"{hop}, closed HTTP connection, in the prompt", times)
        self.report(figures, "engine", worst)

    def slot(self, engine, node, model, ask, wait, options):
        times = []
        for _ in range(self.tries):
            with ask(node, model, wait, **options) as leave:
                begun = time.monotonic()
                leave()
                self.next(engine.a, model)
                times.append(time.monotonic() - begun)
        return times

    def next(self, node, model):
        asked = Asked(node, model, tokens=1)
        asked.first_text()
        asked.leave()

    def note(self, worst, case, times):
        worst[case] = round(max(times), 3)
        say(f"  {case}: {worst[case]} s")

    def report(self, figures, what, worst):
        figures.limit("cancel", f"cancel → slot free, {what}, worst of {self.tries} tries each", "s", list(worst.values()), worst, reach=LIMIT)
