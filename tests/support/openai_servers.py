"""OpenAI-compatible servers for tests: one that does what a test tells it, over real sockets, and real ones of others."""

import http.server
import importlib.util
import json
import os
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx

from services.local.ports import free_port
from tests.support.servers import wait_until

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def chat_answer(text="fine", finish_reason="stop", usage=USAGE, **choice):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason} | choice
    return {"choices": [choice], "usage": usage}


class ScriptedServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers each POST as `answer(call)` says, where `call` is a Handler; notes what it was asked and how much at once."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, answer, port=0):
        self.answer = answer
        self.lock = threading.Lock()
        self.bodies, self.paths, self.keys, self.times = [], [], [], []
        self.tries = Counter()
        self.connections = self.now = self.most = self.probes = 0
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass  # clients that leave are what some tests are about

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.words = (self.body.get("messages") or [{"content": str(self.body.get("prompt"))}])[-1]["content"]
        server = self.server
        with server.lock:
            server.bodies.append(self.body)
            server.paths.append(self.path)
            server.keys.append(self.headers.get("Authorization"))
            server.times.append(time.monotonic())
            server.tries[self.words] += 1
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            server.answer(self)
        finally:
            with server.lock:
                server.now -= 1

    def do_HEAD(self):
        self.server.probes += 1
        self.send_response(405)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def say(self, status=200, content=None, **headers):
        raw = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(raw), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(raw)

    def stream(self, blocks, *, ends=True):
        """Send blocks of bytes as they are, each one a chunk of the body."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for block in blocks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            self.wfile.flush()
        if ends:
            self.wfile.write(b"0\r\n\r\n")

    def reset(self):
        """Break the connection, as a process does that is killed."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def has_left(self, seconds):
        """Return whether the client closes its connection within so many seconds."""
        self.connection.settimeout(seconds)
        try:
            return self.connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def log_message(self, *_):
        pass


def event(content):
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


def chunk(content=None, finish_reason=None, index=0, **more):
    choice = {"index": index, "delta": {} if content is None else {"content": content}, "finish_reason": finish_reason}
    return {"choices": [choice | more]}


class ServerProcess:
    """A server in a process of its own that can be killed and started again on the same port."""

    def __init__(self, command, port, log, ready, environment=None):
        self.url, self._command, self._log, self._ready = f"http://127.0.0.1:{port}/v1", command, log, ready
        self._environment = {**os.environ, **(environment or {})}
        self.process = None

    def start(self, *, wait=True):
        with open(self._log, "ab") as output:
            self.process = subprocess.Popen(
                self._command, stdout=output, stderr=output, env=self._environment, start_new_session=True
            )
        if wait:
            wait_until(self.is_ready, 120, f"{self._command[:4]} answers; its log is {self._log}")

    def is_ready(self):
        assert self.process.poll() is None, Path(self._log).read_text()[-3000:]
        try:
            return httpx.get(f"{self.url}{self._ready}", timeout=2).status_code < 500
        except httpx.HTTPError:
            return False

    def kill(self):
        self.process.kill()
        self.process.wait()


@contextmanager
def running(server):
    server.start()
    try:
        yield server
    finally:
        server.kill()


def missing(*modules):
    """Return why a real server cannot run here, None when it can."""
    gone = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(gone)} not installed" if gone else None


def transformers_serve(model, directory):
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return ServerProcess(command, port, directory / "transformers-serve.log", "/nowhere", environment)


def llama_cpp_server(gguf, directory):
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", "tiny"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--n_ctx", "512", "--n_threads", "1"]
    return ServerProcess(command, port, directory / "llama-cpp-server.log", "/models")


def write_byte_gguf(path):
    """Write a random Llama with a tokenizer of bytes, such as llama.cpp reads."""
    import gguf
    import numpy as np

    width, heads, layers, feed = 64, 4, 2, 128
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name, *shape):
        writer.add_tensor(name, random.normal(0, 0.3, shape).astype(np.float32))

    def ones(name):
        writer.add_tensor(name, np.ones(width, np.float32))

    matrix("token_embd.weight", len(tokens), width)
    matrix("output.weight", len(tokens), width)
    ones("output_norm.weight")
    for i in range(layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        for part in ("q", "k", "v", "output"):
            matrix(f"blk.{i}.attn_{part}.weight", width, width)
        matrix(f"blk.{i}.ffn_gate.weight", feed, width)
        matrix(f"blk.{i}.ffn_up.weight", feed, width)
        matrix(f"blk.{i}.ffn_down.weight", width, feed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class CountingProxy:
    """Passes connections on to another port, and counts how many are open. What cannot be passed on is closed."""

    def __init__(self, port):
        self.now = self.most = self.total = 0
        self._target, self._lock = port, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client):
        with self._lock:
            self.now, self.total = self.now + 1, self.total + 1
            self.most = max(self.most, self.now)
        try:
            with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
                back.start()
                self._pump(client, server)
                back.join()
        except OSError:
            pass
        finally:
            with self._lock:
                self.now -= 1

    @staticmethod
    def _pump(source, sink):
        try:
            while block := source.recv(1 << 16):
                sink.sendall(block)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
