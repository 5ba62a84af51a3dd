//! Compiles `bpf/steer.bpf.c` to an ELF object that `src/program.rs` embeds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "../../bpf/steer.bpf.c";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let out_dir = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let status = Command::new(&clang)
        // -g makes the BTF that describes the maps; the kernel need not have any of its own.
        .args(["-target", "bpf", "-mcpu=v2", "-O2", "-g", "-Wall", "-Wextra", "-Werror"])
        .args(asm_include_dir().map(|dir| format!("-I{}", dir.display())))
        .args(["-c", SOURCE, "-o"])
        .arg(Path::new(&out_dir).join("steer.bpf.o"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{clang} could not compile {SOURCE} ({status}); it needs the Debian package libbpf-dev"),
        Err(error) => {
            panic!("cannot run {clang} ({error}); install the Debian package clang, or set CLANG")
        }
    }
}

/// Where Debian keeps `asm/types.h`: below the multiarch name, which `-target bpf` does not look at.
fn asm_include_dir() -> Option<PathBuf> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let dir = PathBuf::from(format!("/usr/include/{arch}-linux-gnu"));
    dir.is_dir().then_some(dir)
}
