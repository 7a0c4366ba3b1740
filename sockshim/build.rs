//! Compiles the few functions that Rust cannot define: those with C's variable arguments, and references to libc that
//! not each libc has.

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    cc::Build::new()
        .file("csrc/variadic.c")
        .file("csrc/libc.c")
        .file("csrc/thread.c")
        // Checked variants of libc's functions are glibc's alone.
        .flag("-U_FORTIFY_SOURCE")
        .warnings(true)
        .extra_warnings(true)
        .compile("variadic");
    // The archive's symbols are exported too, though nothing in Rust refers to them.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,now");
}
