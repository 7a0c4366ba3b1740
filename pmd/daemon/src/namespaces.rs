//! Network namespaces of tenants: netlink sockets for each, kept while a tenant lives there.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use nix::sys::stat::fstat;

use crate::diag::{Diag, place_of};
use crate::process::netns_inode;
use crate::rights::Home;

/// The namespaces that tenants live in, by inode. An open netlink socket keeps its namespace,
/// and so the inode's number, from being used again.
#[derive(Debug)]
pub struct Namespaces {
    home: u64,
    of_home: Arc<Diag>,
    open: HashMap<u64, Namespace>,
}

#[derive(Debug)]
struct Namespace {
    diag: Arc<Diag>,
    cookie: u64,
    tenants: usize,
}

impl Namespaces {
    /// Knows the daemon's own namespace, and none other yet.
    pub fn new() -> io::Result<Self> {
        let home = netns_inode(std::process::id() as i32)?;
        let of_home = Arc::new(Diag::of_home()?);
        let mut namespaces = Namespaces {
            home,
            of_home: of_home.clone(),
            open: HashMap::new(),
        };
        namespaces.insert(home, of_home);
        Ok(namespaces)
    }

    fn insert(&mut self, inode: u64, diag: Arc<Diag>) {
        let namespace = Namespace {
            cookie: diag.netns_cookie(),
            diag,
            tenants: 0,
        };
        self.open.insert(inode, namespace);
    }

    /// A tenant came to a namespace. False where that is not open: a porter is to [`open`] it.
    pub fn enter(&mut self, inode: u64) -> bool {
        let namespace = self.open.get_mut(&inode);
        namespace.map(|namespace| namespace.tenants += 1).is_some()
    }

    /// Whether a namespace is open, or there is none of this number.
    pub fn is_open(&self, inode: u64) -> bool {
        self.open.contains_key(&inode)
    }

    /// A porter has opened a namespace, for a tenant that enters it, or does not after all and leaves.
    pub fn add(&mut self, opened: Opened) {
        if let Some(diag) = opened.diag
            && !self.is_open(opened.inode)
        {
            self.insert(opened.inode, Arc::new(diag));
        }
    }

    /// A tenant of the namespace left.
    pub fn leave(&mut self, inode: u64) {
        let Some(namespace) = self.open.get_mut(&inode) else {
            return;
        };
        namespace.tenants = namespace.tenants.saturating_sub(1);
        if namespace.tenants == 0 && inode != self.home {
            self.open.remove(&inode);
        }
    }

    /// The namespace that a tenant says its socket is in: the one with this cookie, or, on
    /// kernels without cookies, the tenant's own. What the tenant says is only a hint where to
    /// look: the socket is then found there, or not.
    pub fn locate(&self, cookie: u64, own: u64) -> Option<(u64, &Arc<Diag>)> {
        let own_entry = self.open.get(&own);
        if let Some(namespace) = own_entry
            && (namespace.cookie == cookie || namespace.cookie == 0 || cookie == 0)
        {
            return Some((own, &namespace.diag));
        }
        self.open
            .iter()
            .find(|(_, namespace)| namespace.cookie == cookie && cookie != 0)
            .map(|(inode, namespace)| (*inode, &namespace.diag))
    }

    /// Is this the cookie of a socket in the daemon's own namespace? On kernels without cookies (0) it
    /// is believed to be.
    pub fn is_home(&self, cookie: u64) -> bool {
        let home = self.of_home.netns_cookie();
        cookie == home || cookie == 0 || home == 0
    }

    /// Is this the daemon's own namespace, by its inode?
    pub fn is_home_inode(&self, inode: u64) -> bool {
        inode == self.home
    }

    /// The daemon's own namespace, by its inode, and its netlink sockets.
    pub fn home(&self) -> (u64, &Arc<Diag>) {
        (self.home, &self.of_home)
    }

    /// The cookie of the daemon's own namespace.
    pub fn home_cookie(&self) -> Home {
        Home(self.of_home.netns_cookie())
    }

    /// The netlink socket of a namespace.
    pub fn diag(&self, inode: u64) -> Option<&Arc<Diag>> {
        self.open.get(&inode).map(|namespace| &namespace.diag)
    }
}

/// A namespace that a porter has looked at.
#[derive(Debug)]
pub struct Opened {
    /// Its inode.
    pub inode: u64,
    /// A netlink socket in it; `None` where it is the one that was known.
    diag: Option<Diag>,
}

/// Makes a netlink socket in the network namespace that a process is in, unless that is the `known` one, by a thread that moves there.
/// Waits for that: for a porter.
pub fn open(pid: i32, known: Option<u64>) -> io::Result<Opened> {
    let namespace = place_of(format!("/proc/{pid}/ns/net").as_ref())?;
    let inode = fstat(&namespace)?.st_ino;
    if known == Some(inode) {
        return Ok(Opened { inode, diag: None });
    }
    let diag = Some(Diag::of(namespace)?);
    Ok(Opened { inode, diag })
}
