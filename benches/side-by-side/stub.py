"""An OpenAI-compatible server that answers every prompt with 1 MiB of text, in pieces of 4 KiB."""
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "mebibyte"
ANSWER_BYTES = 1 << 20
PIECE_BYTES = 4096


class Stub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        body = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "stub"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

        def event(text):
            data = f"data: {text}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        def chunk(delta, reason):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return json.dumps({"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]})

        piece = chunk({"content": "a" * PIECE_BYTES}, None)
        for _ in range(ANSWER_BYTES // PIECE_BYTES):
            event(piece)
        event(chunk({}, "stop"))
        event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


ThreadingHTTPServer.daemon_threads = True
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Stub)
print('{"ev":"ready"}', flush=True)
server.serve_forever()
