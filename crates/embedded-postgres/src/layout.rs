//! The names in a data directory.

use std::path::{Path, PathBuf};

use crate::dirs;

/// The directory of the Unix socket.
pub(crate) const SOCKET_DIR: &str = "socket";
/// The prefix of clusters, which the major version follows.
const CLUSTER_PREFIX: &str = "postgres-";
/// The prefix of directories whose creation is in progress.
pub(crate) const PARTIAL_PREFIX: &str = "partial-";
/// The file by which PostgreSQL recognizes a cluster.
pub(crate) const VERSION_FILE: &str = "PG_VERSION";
/// The file in a cluster that contains the password.
pub(crate) const PASSWORD_FILE: &str = "password";

/// Returns the name of the cluster of a major version.
pub(crate) fn cluster_name(major: u32) -> String {
    format!("{CLUSTER_PREFIX}{major}")
}

/// Returns the paths of the clusters in a data directory.
pub(crate) fn clusters(data_dir: &Path) -> impl Iterator<Item = PathBuf> {
    let is_cluster =
        |dir: &PathBuf| major_version(dir).is_some() && dir.join(VERSION_FILE).is_file();
    dirs::entries_with_prefix(data_dir, CLUSTER_PREFIX).filter(is_cluster)
}

/// Returns the major versions that have a cluster in a data directory.
pub(crate) fn major_versions(data_dir: &Path) -> Vec<u32> {
    clusters(data_dir).filter_map(|cluster| major_version(&cluster)).collect()
}

fn major_version(cluster: &Path) -> Option<u32> {
    cluster.file_name()?.to_str()?.strip_prefix(CLUSTER_PREFIX)?.parse().ok()
}
