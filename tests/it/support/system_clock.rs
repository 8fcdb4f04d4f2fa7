//! A system clock that is wrong, for a server in a process of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tempfile::TempDir;

use super::process::Binary;

/// Replaces the function of the C library by which Rust reads the time.
const LIBRARY: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && clock == CLOCK_REALTIME) {
        char seconds[32] = {0};
        int file = open(getenv("TEST_CLOCK_ERROR"), O_RDONLY);
        if (file >= 0 && read(file, seconds, sizeof seconds - 1) > 0) time->tv_sec += atol(seconds);
        close(file);
    }
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

/// The error of a system clock.
pub struct ClockError(TempDir);

impl ClockError {
    /// A clock that is ahead by this many seconds.
    pub fn of(seconds: i64) -> Self {
        let error = Self(TempDir::new().expect("a directory"));
        error.set(seconds);
        error
    }

    /// Steps the clock. Replaces the file, so that the process reads either number.
    pub fn set(&self, seconds: i64) {
        let new = self.0.path().join("new");
        fs::write(&new, seconds.to_string()).expect("written");
        fs::rename(new, self.path()).expect("renamed");
    }

    fn path(&self) -> PathBuf {
        Path::join(self.0.path(), "seconds")
    }
}

impl Binary {
    /// Gives the process a system clock with an error.
    pub fn with_clock_error(self, error: &ClockError) -> Self {
        self.env("LD_PRELOAD", library().to_str().expect("UTF-8"))
            .env("TEST_CLOCK_ERROR", error.path().to_str().expect("UTF-8"))
    }
}
