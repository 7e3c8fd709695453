#!/usr/bin/env python3
"""upstream.py PORT PIECES PAUSE - a model server that takes its time: the model "slow" answers every prompt with PIECES words,
PAUSE seconds apart. It speaks as much of the OpenAI API as a backend of opengatewayd asks for."""
import http.server
import json
import sys
import time

port, pieces, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"object": "list", "data": [{"id": "slow"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(pieces):
            self.event({"choices": [{"delta": {"content": f"word{number} "}}]})
            time.sleep(pause)
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


http.server.ThreadingHTTPServer(("127.0.0.1", port), Server).serve_forever()
