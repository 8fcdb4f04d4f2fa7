//! PostgreSQL's programs on this machine.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    command::{command, output},
    dirs,
};

/// The oldest supported major version.
pub(crate) const OLDEST_MAJOR: u32 = 14;

/// The prefix of the directories of downloaded programs.
pub(crate) const DOWNLOAD_PREFIX: &str = "postgresql-";

/// How long a program may take to print its version. The first run reads it from the disk.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// The directories of distributions that are not in `PATH`: the parent, the prefix of the
/// name in it, and the rest of the path.
const SYSTEM_DIRS: [(&str, &str, &str); 10] = [
    // Debian, Ubuntu.
    ("/usr/lib/postgresql", "", "bin"),
    // openSUSE, Gentoo.
    ("/usr/lib", "postgresql", "bin"),
    ("/usr/lib64", "postgresql", "bin"),
    // Alpine.
    ("/usr/libexec", "postgresql", ""),
    // PostgreSQL's own packages for Red Hat's distributions.
    ("/usr", "pgsql-", "bin"),
    // Homebrew, on Apple silicon, Intel and Linux.
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"),
    // MacPorts.
    ("/opt/local/lib", "postgresql", "bin"),
    // Postgres.app.
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// A PostgreSQL that runs on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    pub(crate) bin_dir: PathBuf,
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl Installation {
    /// Returns the path of one of the programs.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    /// Returns `None` if a directory contains no complete PostgreSQL, or one that is too old
    /// or does not run here.
    pub(crate) async fn probe(bin_dir: PathBuf) -> Option<Self> {
        if !bin_dir.join("initdb").is_file() {
            return None;
        }
        let mut postgres = command(bin_dir.join("postgres"), &bin_dir);
        let printed = output(postgres.arg("--version"), "", VERSION_TIMEOUT).await.ok()?;
        let (major, minor) = parse_version(&String::from_utf8_lossy(&printed.stdout))?;
        (major >= OLDEST_MAJOR).then_some(Self { bin_dir, major, minor })
    }

    /// Returns the system's installations and those downloaded earlier. The versions in
    /// `preferred` come first, then the newest.
    pub(crate) async fn all(cache_dir: &Path, preferred: &[u32]) -> Vec<Self> {
        let mut found = Vec::new();
        for bin_dir in candidates(cache_dir).await {
            found.extend(Self::probe(bin_dir).await);
        }
        found.sort_by_key(|it| Reverse((preferred.contains(&it.major), it.major, it.minor)));
        found
    }
}

/// Returns the directories that may contain PostgreSQL's programs, each once.
async fn candidates(cache_dir: &Path) -> BTreeSet<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<_> = env::split_paths(&path).filter(|it| it.is_absolute()).collect();
    let pg_config = dirs.iter().map(|dir| dir.join("pg_config")).find(|it| it.is_file());
    if let Some(pg_config) = pg_config {
        let mut pg_config = command(pg_config, Path::new("/"));
        if let Ok(printed) = output(pg_config.arg("--bindir"), "", VERSION_TIMEOUT).await {
            dirs.push(String::from_utf8_lossy(&printed.stdout).trim().into());
        }
    }
    let downloaded = dirs::entries_with_prefix(cache_dir, DOWNLOAD_PREFIX);
    dirs.extend(downloaded.map(|dir| dir.join("bin")));
    for (parent, prefix, rest) in SYSTEM_DIRS {
        let versions = dirs::entries_with_prefix(Path::new(parent), prefix);
        dirs.extend(versions.map(|dir| dir.join(rest)));
    }
    // Drops missing directories, and the other names of those with several.
    dirs.into_iter().filter_map(|dir| dir.canonicalize().ok()).collect()
}

/// Returns the major and minor version in the output of `postgres --version`, such as
/// `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`.
fn parse_version(printed: &str) -> Option<(u32, u32)> {
    let version = printed.strip_prefix("postgres (PostgreSQL) ")?;
    // `19beta1` has no minor version.
    let mut numbers = version.split(|it: char| !it.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    Some((major, numbers.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed_as_distributions_print_them() {
        let debian = "postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)\n";
        assert_eq!(parse_version(debian), Some((15, 13)));
        assert_eq!(parse_version("postgres (PostgreSQL) 18.1\n"), Some((18, 1)));
        assert_eq!(parse_version("postgres (PostgreSQL) 19beta1\n"), Some((19, 0)));
        assert_eq!(parse_version("something else 18.1"), None);
        assert_eq!(parse_version(""), None);
    }
}
