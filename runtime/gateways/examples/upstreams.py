"""Stand-ins for the three model servers of envoy.yaml: each says who it is and which model it was asked for.

python upstreams.py
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SERVERS = {8001: "gemma-2b", 8002: "qwen-7b", 8003: "qwen-72b"}  # the clusters of envoy.yaml


class Server(BaseHTTPRequestHandler):
    """Chat completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self._body())
        name = SERVERS[int(self.connection.getsockname()[1])]
        message = {"role": "assistant", "content": f"{name} answers"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": asked.get("model")}
        answer["choices"] = choices
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []  # as envoy-streamed.yaml sends it
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


if __name__ == "__main__":
    for number in SERVERS:
        threading.Thread(target=ThreadingHTTPServer(("127.0.0.1", number), Server).serve_forever).start()
