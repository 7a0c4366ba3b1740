//! Programs into which the shim can't be loaded, or where it can do nothing: they start all the same, as if it were not
//! there, and `rdsock why` says what is the matter.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rdsock_tests::{Daemon, Folder, Program, place, why};

const LIMIT: Duration = Duration::from_secs(60);

/// A program that talks over a connection of its own, and says so.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
#ifdef IO_URING /* before anything else; that the kernel refuses it does not matter */
    syscall(SYS_io_uring_setup, 0, NULL);
#endif
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0), end, other;
    char *bytes = malloc(16);
    if (bind(listener, (void *)&at, len) || listen(listener, 1) || getsockname(listener, (void *)&at, &len))
        return 2;
    other = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(other, (void *)&at, len) || (end = accept(listener, NULL, NULL)) < 0)
        return 3;
    for (int i = 0; i < 50; i++) {
        if (send(other, "question", 8, 0) != 8 || recv(end, bytes, 8, MSG_WAITALL) != 8)
            return 4;
        if (send(end, "response", 8, 0) != 8 || recv(other, bytes, 8, MSG_WAITALL) != 8)
            return 5;
        usleep(1000);
    }
    free(bytes);
    printf("talked on %d.\n", ntohs(at.sin_port));
    fflush(stdout);
    if (argc > 1)
        sleep((unsigned)atoi(argv[1]));
    return 0;
}
"#;

/// Builds the program with a compiler; `None`, loudly, where that can't.
fn build(folder: &Folder, compiler: &str, flags: &[&str]) -> Option<PathBuf> {
    let source = folder.path().join("program.c");
    std::fs::write(&source, PROGRAM).unwrap();
    let program = folder.path().join("program");
    let output = Command::new(compiler)
        .args(["-O1", "-g", "-o"])
        .args([&program, &source])
        .args(flags)
        .output();
    match output {
        Ok(output) if output.status.success() => Some(program),
        other => {
            eprintln!(
                "SKIPPED, NOTHING WAS CHECKED: {compiler} {flags:?} builds nothing: {other:?}"
            );
            None
        }
    }
}

/// Runs it plain, preloaded, and preloaded as the child of a shell; what the last two print beside what it says itself.
fn runs_everywhere(daemon: &Daemon, folder: &Folder, program: &Path) -> String {
    let plain = Program::new(program, folder.path()).run(LIMIT);
    assert!(plain.contains("talked on"), "{plain}");
    let direct = Program::new(program, folder.path())
        .preloaded(&daemon.socket())
        .run(LIMIT);
    let child = Program::new("bash", folder.path())
        .arg("-c")
        .arg(format!("'{}' && true", program.display()))
        .preloaded(&daemon.socket())
        .run(LIMIT);
    let others = |output: &str| -> String {
        assert!(output.contains("talked on"), "{output}");
        let lines = output.lines().filter(|line| !line.contains("talked on"));
        lines.collect::<Vec<_>>().join("\n")
    };
    others(&direct) + &others(&child)
}

/// Symbols that the shim may need of the libc that it is loaded into: those that musl has, too, under no version.
const NEEDED: [&str; 24] = [
    "__errno_location",
    "access",
    "bcmp",
    "clock_gettime",
    "environ",
    "fgetc",
    "free",
    "getenv",
    "malloc",
    "memcmp",
    "memcpy",
    "memmove",
    "memset",
    "pwrite",
    "sched_getaffinity",
    "sched_getcpu",
    "setvbuf",
    "strlen",
    "sysconf",
    "ungetc",
    "vasprintf",
    // Weak in each library that gcc links.
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
];

fn tool(name: &str, args: &[&str]) -> String {
    let output = Command::new(name)
        .args(args)
        .arg(place::binary("librdsock.so"))
        .output()
        .unwrap_or_else(|error| panic!("{name} (binutils): {error}"));
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_shim_needs_nothing_that_another_libc_lacks() {
    let dynamic = tool("readelf", &["-d"]);
    let libraries: Vec<&str> = dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .collect();
    assert!(libraries.is_empty(), "{libraries:?}");
    let symbols = tool("nm", &["-D", "--undefined-only"]);
    let strong: BTreeSet<&str> = symbols
        .lines()
        .filter_map(|line| line.trim().strip_prefix("U "))
        .collect();
    let others: Vec<_> = strong
        .iter()
        .filter(|name| !NEEDED.contains(name))
        .collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(!symbols.contains('@'), "by version: {symbols}");
}

/// Alpine's libc. Its loader takes the shim, which does nothing there.
#[test]
fn a_program_of_another_libc_runs_and_why_says_so() {
    let folder = Folder::new();
    let Some(program) = build(&folder, "musl-gcc", &[]) else {
        return;
    };
    let daemon = Daemon::start("");
    let said = runs_everywhere(&daemon, &folder, &program);
    assert!(!said.contains("rror"), "{said}");
    let mut running = Program::new(&program, folder.path())
        .arg("30")
        .preloaded(&daemon.socket())
        .start();
    running.wait_for_output("talked on", LIMIT);
    let told = why::ask(&daemon.socket(), Some(running.pid()));
    let reasons: Vec<_> = told
        .processes
        .iter()
        .filter_map(|process| process.reason.as_deref())
        .collect();
    assert!(
        reasons
            .iter()
            .any(|reason| reason.contains("another C library")),
        "{reasons:?}"
    );
}

/// gcc's AddressSanitizer as a shared library wants to be loaded first, and ends the program else.
#[test]
fn a_program_that_used_io_uring_before_its_first_connection_has_that_as_the_reason() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let Some(program) = build(&folder, "cc", &["-DIO_URING"]) else {
        return;
    };
    let running = Program::new(&program, folder.path())
        .args("60")
        .preloaded(&daemon.socket())
        .start();
    let end = Instant::now() + LIMIT;
    loop {
        let told = why::ask(&daemon.socket(), Some(running.pid()));
        let is_told = |connection: &why::Connection| {
            let reason = connection.reason.as_deref().unwrap_or("");
            !connection.accelerated && reason.contains("io_uring")
        };
        if told.connections.iter().filter(|one| is_told(one)).count() == 2 {
            break;
        }
        assert!(Instant::now() < end, "never said: {told:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_program_with_a_shared_sanitizer_runs() {
    let folder = Folder::new();
    let Some(program) = build(&folder, "gcc", &["-fsanitize=address"]) else {
        return;
    };
    let daemon = Daemon::start("");
    let said = runs_everywhere(&daemon, &folder, &program);
    assert_eq!(said, "");
}

/// What was closed when `rdsock run` was started is closed in the program.
#[test]
fn standard_descriptors_that_are_closed_stay_so() {
    let folder = Folder::new();
    let daemon = Daemon::start("");
    let list = folder.path().join("open");
    for mode in ["", "rdsock"] {
        let prefix = match mode {
            "" => String::new(),
            _ => format!("{} run --no-daemon -- ", place::binary("rdsock").display()),
        };
        let command = format!(
            "exec {prefix}python3 -c 'import os; f = os.open(\"{}\", os.O_WRONLY | os.O_CREAT | os.O_TRUNC); \
             os.write(f, b\"first %d.\" % f)' <&- >&- 2>&-",
            list.display()
        );
        let mut child = Command::new("bash")
            .args(["-c", &command])
            .env("RDSOCK_SOCKET", daemon.socket())
            .spawn()
            .unwrap();
        assert!(child.wait().unwrap().success());
        let said = std::fs::read_to_string(&list).unwrap();
        assert_eq!(said, "first 0.", "{mode}");
    }
}

/// A program that gets capabilities loads nothing: a connection that it inherits is the kernel's before it starts.
#[test]
fn a_program_with_capabilities_gets_its_connection() {
    const PARENT: &str = r#"
import os, socket, sys, threading, time
listener = socket.create_server(("127.0.0.1", 0))
far = socket.create_connection(listener.getsockname())
near, _ = listener.accept()
for i in range(60):
    far.sendall(b"ping"); assert near.recv(4, socket.MSG_WAITALL) == b"ping"
    near.sendall(b"pong"); assert far.recv(4, socket.MSG_WAITALL) == b"pong"
    time.sleep(0.001)
os.set_inheritable(near.fileno(), True)
far.set_inheritable(False)
if os.fork() == 0:
    far.close()
    os.setgid(64001); os.setuid(64001)
    os.execv(sys.argv[1], [sys.argv[1], "echo", str(near.fileno())])
near.close()
for i in range(20):
    far.sendall(b"capable"); assert far.recv(7, socket.MSG_WAITALL) == b"CAPABLE", i
far.shutdown(socket.SHUT_WR)
assert far.recv(1) == b""
_, status = os.wait()
assert status == 0, status
print("served", flush=True)
"#;
    let folder = Folder::new();
    let mate = place::tests_folder().join("conformance/mate.c");
    let last = place::tests_folder().join("conformance/last.c");
    let program = folder.path().join("mate");
    let built = Command::new("cc")
        .args(["-O1", "-o"])
        .args([&program, &mate, &last])
        .status()
        .expect("a C compiler");
    assert!(built.success());
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    // cap_net_bind_service, permitted and effective: struct vfs_cap_data of version 2.
    let capabilities: [u32; 5] = [0x0200_0001, 1 << 10, 0, 0, 0];
    let bytes: Vec<u8> = capabilities
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let path = std::ffi::CString::new(program.to_str().unwrap()).unwrap();
    // SAFETY: strings that end in 0, and bytes of the length given.
    let set = unsafe {
        let name = c"security.capability".as_ptr();
        libc::setxattr(path.as_ptr(), name, bytes.as_ptr().cast(), bytes.len(), 0)
    };
    if set != 0 {
        eprintln!(
            "SKIPPED, NOTHING WAS CHECKED: no capabilities on this file system: {}",
            std::io::Error::last_os_error()
        );
        return;
    }
    let daemon = Daemon::start("");
    for preloaded in [false, true] {
        let parent = Program::new("python3", folder.path())
            .args("-c")
            .arg(PARENT)
            .arg(&program);
        let parent = match preloaded {
            true => parent.preloaded(&daemon.socket()),
            false => parent,
        };
        assert!(parent.run(LIMIT).contains("served"));
    }
}
