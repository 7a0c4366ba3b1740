//! What stands where a socket or a lock file is wanted: only a socket of ours that nobody serves is replaced.

use rdsock_model::{Chaos, Fabric};
use rdsock_vfio::link::LinkError;
use rdsock_vfio::model::ModelDevice;
use rdsock_vfio::serve::{Server, Serving};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

fn start(path: &Path) -> std::io::Result<Server> {
    let serving = Serving {
        queue_sets: 2,
        trapped: false,
    };
    Server::start(&Fabric::new(Chaos::default()), path, serving)
}

#[test]
fn a_server_replaces_a_dead_socket_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    drop(UnixListener::bind(at("dead")).unwrap());
    let server = start(&at("dead")).unwrap();
    UnixStream::connect(at("dead")).unwrap();
    let error = start(&at("dead")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    drop(server);
    assert!(!at("dead").exists());

    fs::write(at("file"), "precious").unwrap();
    symlink(at("file"), at("link")).unwrap();
    for (name, words) in [("file", "a regular file"), ("link", "a symbolic link")] {
        let error = start(&at(name)).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"precious");

    // Somebody else could have put it there.
    drop(UnixListener::bind(at("dead")).unwrap());
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    assert!(start(&at("dead")).is_err());
    assert!(at("dead").exists());
}

/// Whatever the mask of who starts it: who is the client has the node's place on the fabric.
#[test]
fn only_its_user_comes_to_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let _server = start(&path).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
}

#[test]
fn a_server_that_ends_leaves_what_came_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let server = start(&path).unwrap();
    fs::rename(&path, dir.path().join("moved")).unwrap();
    fs::write(&path, "came later").unwrap();
    drop(server);
    assert_eq!(fs::read(&path).unwrap(), b"came later");
}

#[test]
fn a_linked_model_touches_no_file_of_others() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let at = |name: &str| dir.path().join(name);
    let linked = || ModelDevice::linked(&Fabric::new(Chaos::default()), dir.path(), 1, 2);
    let refused = |words: &str| {
        let error = linked().unwrap_err();
        assert!(matches!(error, LinkError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    fs::write(at("1.sock"), "precious").unwrap();
    refused("1.sock");
    assert_eq!(fs::read(at("1.sock")).unwrap(), b"precious");
    fs::remove_file(at("1.sock")).unwrap();
    let _ = fs::remove_file(at("1.lock"));
    symlink(at("elsewhere"), at("1.lock")).unwrap();
    refused("1.lock");
    assert!(!at("elsewhere").exists());
    fs::remove_file(at("1.lock")).unwrap();
    drop(linked().unwrap());
    assert!(!at("1.sock").exists());
}
