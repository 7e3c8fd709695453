"""An OpenAI-compatible server with known answers, as the upstream of the daemon under test.

It answers "What is 2+2?" with "4", "Count to N" with the numbers, one a piece, and everything else with "I do not know.".
Models "busy" and "broken" fail with 429 and 500. It counts one token a word, so that usage can be compared exactly.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = ["calc", "busy", "broken", "slow"]
gone = threading.Event()
busy_left = 2


def pieces(prompt):
    if prompt.startswith("Count to "):
        last = int(prompt.removeprefix("Count to "))
        return [f"{n} " for n in range(1, last)] + [str(last)]
    return ["4"] if "2+2" in prompt else ["I ", "do ", "not ", "know."]


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def whole(self, status, value, more=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in more:
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/gone":
            return self.whole(200, {"gone": gone.is_set()})
        self.whole(200, {"object": "list", "data": [{"id": m, "object": "model", "context_length": 4096} for m in MODELS]})

    def do_POST(self):
        global busy_left
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = asked["model"]
        if model == "broken":
            return self.whole(500, {"error": {"message": "broken on purpose"}})
        if model == "busy" and busy_left > 0:
            busy_left -= 1
            return self.whole(429, {"error": {"message": "busy on purpose"}}, [("Retry-After", "1")])
        prompt = asked.get("prompt") or asked["messages"][-1]["content"]
        words = pieces(prompt)
        most = asked.get("max_tokens") or 10**6
        finish = "length" if len(words) > most else "stop"
        words = words[:most]
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def say(choices, **more):
            self.wfile.write(b"data: " + json.dumps({"id": "x", "choices": choices, **more}).encode() + b"\n\n")
            self.wfile.flush()

        try:
            for word in words:
                if model == "slow":
                    time.sleep(0.05)
                text = {"text": word} if "prompt" in asked else {"delta": {"content": word}}
                say([{"index": 0, "finish_reason": None, **text}])
            say([{"index": 0, "finish_reason": finish, **({"text": ""} if "prompt" in asked else {"delta": {}})}])
            say([], usage=usage)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            gone.set()


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
with open(sys.argv[1], "w") as port:
    port.write(str(server.server_address[1]))
server.serve_forever()
