//! MariaDB with a pool of threads and mariadb-slap: one thread sleeps in `epoll_wait` for all connections, and workers arm each of
//! them again (EPOLLONESHOT) and look once before they go to sleep elsewhere.

use std::time::Duration;

use nix::sys::signal::Signal;
use rdsock_tests::{Running, Site, in_each_mode, place};

const LIMIT: Duration = Duration::from_secs(120);

struct Mariadb {
    running: Running,
    port: u16,
}

impl Drop for Mariadb {
    /// It has files to close.
    fn drop(&mut self) {
        if self.running.ended().is_none() {
            self.running.signal(Signal::SIGKILL);
            self.running.wait(Duration::from_secs(20));
        }
    }
}

/// The options that are the same when it is set up and when it runs.
fn options(site: &Site) -> String {
    let user = if place::is_root() { "--user=root" } else { "" };
    format!(
        "--no-defaults {user} --datadir={}",
        site.folder.at("data").display()
    )
}

/// A server with an empty database.
fn server(site: &Site) -> Mariadb {
    let port = place::free_port();
    site.plain(place::command(&["mariadb-install-db"]))
        .args(&options(site))
        .args("--auth-root-authentication-method=normal --skip-test-db --innodb-log-file-size=4M")
        .run(LIMIT);
    let running = site
        .server(place::command(&["mariadbd"]))
        .args(&options(site))
        .args(&format!("--port={port} --bind-address=127.0.0.1 --skip-name-resolve"))
        .args(&format!("--socket={}", site.folder.at("socket").display()))
        .args(&format!("--pid-file={}", site.folder.at("pid").display()))
        // Asynchronous input and output of the kernel's goes past the shim, which keeps such a program's connections there.
        .args("--innodb-use-native-aio=0")
        .args("--thread-handling=pool-of-threads --thread-pool-size=2 --max-connections=100")
        .args("--innodb-flush-log-at-trx-commit=0 --innodb-log-file-size=4M --skip-log-bin --skip-grant-tables")
        .start()
        .wait_for_port(port);
    Mariadb { running, port }
}

/// More connections than are looked at in any case, and few.
fn load(site: Site) {
    let mut server = server(&site);
    for connections in [16, 4] {
        let client = site
            .client(place::command(&["mariadb-slap"]))
            .args("--no-defaults --protocol=tcp --host=127.0.0.1 --user=root --silent")
            .args(&format!(
                "--port={} --concurrency={connections}",
                server.port
            ))
            .args("--auto-generate-sql --auto-generate-sql-load-type=read")
            .args("--auto-generate-sql-write-number=20 --number-of-queries=40000")
            .start();
        let (output, _) = site.finish(client, server.port, connections / 2, LIMIT);
        assert!(!output.contains("ERROR"), "mariadb-slap says:\n{output}");
    }
    assert!(server.running.ended().is_none(), "the server runs");
}

in_each_mode!(load);
