//! python3: `http.server` with a client of many threads, and an asyncio echo.

use std::time::Duration;

use rdsock_tests::{Running, Site, between_nodes, in_each_mode, place, with_the_lowest_limits};

const LIMIT: Duration = Duration::from_secs(120);

/// Fetches each file many times from 16 threads, and says what it got wrong.
const HTTP_CLIENT: &str = r#"
import concurrent.futures, hashlib, os, sys, urllib.request
port, folder = int(sys.argv[1]), sys.argv[2]
names = [f"file{i}" for i in range(8)] + ["large"]
right = {n: hashlib.sha256(open(os.path.join(folder, n), "rb").read()).hexdigest() for n in names}
def fetch(i):
    name = names[i % len(names)]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=60) as answer:
        return hashlib.sha256(answer.read()).hexdigest() == right[name]
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    results = list(pool.map(fetch, range(270)))
assert all(results), results.count(False)
print("fetched", len(results))
"#;

const ECHO_SERVER: &str = r#"
import asyncio, sys
async def serve(reader, writer):
    while block := await reader.read(65536):
        writer.write(block)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    print("listening", flush=True)
    await server.serve_forever()
asyncio.run(main())
"#;

/// Fifty connections at once: small messages, then a big one, then half-close and EOF.
const ECHO_CLIENT: &str = r#"
import asyncio, os, sys
async def talk(port, number):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for i in range(200):
        message = f"{number}:{i};".encode() * (1 + i % 9)
        writer.write(message)
        await writer.drain()
        assert await reader.readexactly(len(message)) == message
    big = os.urandom(2 << 20)
    writer.write(big)
    assert await reader.readexactly(len(big)) == big
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
async def main():
    await asyncio.gather(*(talk(int(sys.argv[1]), n) for n in range(50)))
    print("echoed")
asyncio.run(main())
"#;

/// A server of threads with blocking sockets, makefile() and time limits, in one process.
const THREADED: &str = r#"
import hashlib, os, socket, socketserver, sys, threading
class Handler(socketserver.StreamRequestHandler):
    timeout = 30
    def handle(self):
        for line in self.rfile:
            length = int(line)
            body = self.rfile.read(length)
            self.wfile.write(hashlib.sha256(body).hexdigest().encode() + b"\n")
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64
server = Server(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
failed = []
def client():
    try:
        with socket.create_connection(server.server_address, timeout=30) as s, s.makefile("rb") as f:
            for i in range(60):
                body = os.urandom(1 + (i * 7919) % 100000)
                s.sendall(f"{len(body)}\n".encode() + body)
                assert f.readline().strip().decode() == hashlib.sha256(body).hexdigest()
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=client) for _ in range(16)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failed, failed
print("all right")
"#;

/// Connections that are never on rings, each left to a program by exec: how many of those take
/// long. They give way to the daemon, which then says all that it has to say at once.
const INHERITED: &str = r#"
import os, socket, subprocess, time
os.nice(19)
listener = socket.create_server(("127.0.0.1", 0))
def seconds():
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
        start = time.monotonic()
        subprocess.run(["/bin/true"], stdin=connection, check=True)
        return time.monotonic() - start
slow = [s for s in (seconds() for _ in range(40)) if s > 0.9]
assert len(slow) < 2, slow
print("all soon")
"#;

fn http_server(site: Site) {
    let port = place::free_port();
    let mut state = 1_usize;
    for i in 0..8 {
        state = state * 7 + 13;
        site.folder
            .write_noise(&format!("file{i}"), 1 + state % 300_000);
    }
    site.folder.write_noise("large", 24 << 20);
    let _server: Running = site
        .server(place::command(&["python3"]))
        .args(&format!(
            "-u -m http.server --bind 127.0.0.1 {port} --directory"
        ))
        .arg(site.folder.path())
        .start()
        .wait_for_port(port);
    let script = site.folder.write("client.py", HTTP_CLIENT);
    let client = site
        .client(place::command(&["python3"]))
        .arg(script)
        .arg(port.to_string())
        .arg(site.folder.path())
        .start();
    let (output, _) = site.finish(client, port, 1, LIMIT);
    assert!(output.contains("fetched 270"), "the client says:\n{output}");
}

fn asyncio_echo(site: Site) {
    let port = place::free_port();
    let script = site.folder.write("server.py", ECHO_SERVER);
    let mut server = site
        .server(place::command(&["python3"]))
        .arg(script)
        .arg(port.to_string())
        .start();
    server.wait_for_output("listening", LIMIT);
    let script = site.folder.write("client.py", ECHO_CLIENT);
    let client = site
        .client(place::command(&["python3"]))
        .arg(script)
        .arg(port.to_string())
        .start();
    let (output, _) = site.finish(client, port, 25, LIMIT);
    assert!(output.contains("echoed"), "the client says:\n{output}");
}

fn threads_in_one_process(site: Site) {
    let script = site.folder.write("threaded.py", THREADED);
    let output = site
        .client(place::command(&["python3"]))
        .arg(script)
        .run(LIMIT);
    assert!(output.contains("all right"), "python3 says:\n{output}");
}

/// A program that inherits a connection asks the daemon for its stream, and does not wait when
/// there is none.
fn inherited_without_a_stream(site: Site) {
    let script = site.folder.write("inherited.py", INHERITED);
    let output = site
        .server(place::command(&["python3"]))
        .arg(script)
        .run(LIMIT);
    assert!(output.contains("all soon"), "python3 says:\n{output}");
}

in_each_mode!(
    http_server,
    asyncio_echo,
    threads_in_one_process,
    inherited_without_a_stream,
);

between_nodes!(http_server, asyncio_echo);

with_the_lowest_limits!(http_server, asyncio_echo, threads_in_one_process);
