//! Compiles the few functions that Rust cannot define: those with C's variable arguments.

fn main() {
    println!("cargo:rerun-if-changed=csrc/variadic.c");
    cc::Build::new()
        .file("csrc/variadic.c")
        .warnings(true)
        .extra_warnings(true)
        .compile("variadic");
    // The archive's symbols are exported too, though nothing in Rust refers to them.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,now");
}
