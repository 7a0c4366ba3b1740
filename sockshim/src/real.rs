//! The functions that the shim stands in front of: resolved once by the constructor, or on first
//! use when another library's constructor comes earlier.

use libc::{
    aiocb, c_char, c_int, c_long, c_uint, c_ulong, c_void, epoll_event, fd_set, iovec, mmsghdr,
    mode_t, msghdr, nfds_t, off_t, off64_t, pid_t, pollfd, sigevent, sigset_t, size_t, sockaddr,
    socklen_t, ssize_t, timespec, timeval,
};
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

unsafe extern "C" {
    /// Of `csrc/libc.c`: `dlsym`, wherever this libc has it.
    fn rdsock_dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// What a symbol of the program's is; null where it has none.
pub fn symbol(name: &std::ffi::CStr) -> *mut c_void {
    // SAFETY: the name is a C string.
    unsafe { rdsock_dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

/// A function that another library has as well.
pub struct Symbol {
    name: &'static std::ffi::CStr,
    address: AtomicPtr<c_void>,
}

impl Symbol {
    /// Not looked for yet.
    pub const fn new(name: &'static std::ffi::CStr) -> Self {
        let address = AtomicPtr::new(std::ptr::null_mut());
        Symbol { name, address }
    }

    /// Where it is; null where nobody has it.
    #[inline]
    pub fn address_now(&self) -> *mut c_void {
        let address = self.address.load(Relaxed);
        if address.is_null() {
            return self.resolve();
        }
        address
    }

    fn resolve(&self) -> *mut c_void {
        // SAFETY: the name is a C string; RTLD_NEXT looks behind this library.
        let address = unsafe { rdsock_dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.address.store(address, Relaxed);
        address
    }
}

/// The symbol of a function of libc's, and the function that calls it.
macro_rules! libcs_own {
    (alias fn $name:ident($($rest:tt)*) -> $ret:ty) => {};
    ($how:ident fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty) => {
        /// # Safety
        /// As the C function of this name.
        #[allow(non_snake_case)]
        #[inline]
        pub unsafe fn $name($($arg: $ty),*) -> $ret {
            let address = symbols::$name.address_now();
            if address.is_null() {
                set_errno(libc::ENOSYS);
                return -1 as _;
            }
            // SAFETY: the symbol of this name has this type in C; the caller vouches for the rest.
            unsafe {
                let function: unsafe extern "C" fn($($ty),*) -> $ret = std::mem::transmute(address);
                function($($arg),*)
            }
        }
    };
}

macro_rules! symbol {
    (alias $name:ident) => {};
    ($how:ident $name:ident) => {
        #[allow(non_upper_case_globals, non_snake_case)]
        pub static $name: Symbol = Symbol::new(
            // The literal has its zero.
            match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"",
            },
        );
    };
}

macro_rules! find {
    (early $name:ident) => {
        symbols::$name.resolve();
    };
    ($how:ident $name:ident) => {};
}

macro_rules! real {
    (
        functions { $(
            $(#[doc = $class:literal])+ $word:ident { $(
                $how:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
                    = $body:path $(, also $alias:ident)* $(, $(#[$at:meta])* number $number:ident)?;
            )* }
        )* }
        numbers { $($numbers:tt)* }
        variadic { $($variadic:tt)* }
        passed_through { $($passed_through:tt)* }
        real_alone { $( $alone_how:ident fn $alone:ident($($alone_arg:ident: $alone_ty:ty),*) -> $alone_ret:ty; )* }
    ) => {
        mod symbols {
            use super::Symbol;
            $( $( symbol! { $how $name } )* )*
            $( symbol! { $alone_how $alone } )*
        }

        /// Finds those that are called often.
        pub fn resolve() {
            $( $( find! { $how $name } )* )*
            $( find! { $alone_how $alone } )*
        }

        $( $( libcs_own! { $how fn $name($($arg: $ty),*) -> $ret } )* )*
        $( libcs_own! { $alone_how fn $alone($($alone_arg: $alone_ty),*) -> $alone_ret } )*
    };
}

table! { real }

/// What a function of libc returned, or the negated number of its error.
pub fn asked(result: c_int) -> c_int {
    match result {
        -1 => -errno(),
        _ => result,
    }
}

/// The same the other way round: for the program.
pub fn told(result: c_int) -> c_int {
    to_c(result as isize) as c_int
}

/// Sets errno and gives -1 for a negated error number; other results pass through.
#[inline]
pub fn to_c(result: isize) -> isize {
    if (-4095..0).contains(&result) {
        set_errno(-result as c_int);
        return -1;
    }
    result
}

pub fn set_errno(error: c_int) {
    // SAFETY: libc's errno location is valid for the calling thread.
    unsafe { *libc::__errno_location() = error };
}

pub fn errno() -> c_int {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}
