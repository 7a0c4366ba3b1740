//! Libraries whose calls do not come to the shim: those that are loaded with `RTLD_DEEPBIND`, or into a namespace of
//! their own, have libc before it. Any of them may be given any connection, so from then on all are the kernel's.

use crate::identity::{is_foreign, is_ready};
use crate::real::Symbol;
use crate::{demote, tenant};
use libc::{c_int, c_void};
use rdsock_shm::reason::Reason;

/// Of dlfcn.h.
const RTLD_DEEPBIND: c_int = 8;
/// The program's own namespace, of dlfcn.h.
const LM_ID_BASE: usize = 0;

static DLOPEN: Symbol = Symbol::new(c"dlopen");
static DLMOPEN: Symbol = Symbol::new(c"dlmopen");

fn before_loading(past_us: bool) {
    if past_us && is_ready() && !is_foreign() {
        demote::abandon_all(Reason::DeepBind);
        tenant::disable(Reason::DeepBind);
    }
}

extern "C" fn load_nothing() -> *mut c_void {
    std::ptr::null_mut()
}

fn or_nothing(address: *mut c_void) -> *const c_void {
    if address.is_null() {
        return load_nothing as *const c_void;
    }
    address
}

/// What `dlopen` goes on to.
pub extern "C" fn before_dlopen(_path: usize, mode: c_int) -> *const c_void {
    before_loading(mode & RTLD_DEEPBIND != 0);
    or_nothing(DLOPEN.address_now())
}

/// What `dlmopen` goes on to.
pub extern "C" fn before_dlmopen(namespace: usize, _path: usize, mode: c_int) -> *const c_void {
    before_loading(mode & RTLD_DEEPBIND != 0 || namespace != LM_ID_BASE);
    or_nothing(DLMOPEN.address_now())
}
