//! A system clock that is wrong, for a server in a process of its own.

use std::{fs, path::PathBuf, process::Command, sync::OnceLock};

use tempfile::TempDir;

use super::process::Binary;

/// Replaces the function of the C library by which Rust reads the time.
const LIBRARY: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && clock == CLOCK_REALTIME) time->tv_sec += atol(getenv("TEST_CLOCK_ERROR"));
    return result;
}
"#;

/// Compiles the library with the linker that Rust needs anyway.
fn library() -> PathBuf {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = TempDir::new().expect("a directory");
        let source = dir.path().join("clock.c");
        fs::write(&source, LIBRARY).expect("written");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).arg(dir.path().join("clock.so")).arg(source);
        assert!(compiler.status().expect("a C compiler").success());
        dir
    });
    dir.path().join("clock.so")
}

impl Binary {
    /// Sets the system clock of the process forward by this many seconds.
    pub fn with_clock_error(self, seconds: i64) -> Self {
        self.env("LD_PRELOAD", library().to_str().expect("UTF-8"))
            .env("TEST_CLOCK_ERROR", &seconds.to_string())
    }
}
