//! As whom PostgreSQL runs when the process is started as root, which it refuses.

use std::fmt;

use nix::unistd::{Gid, Uid, User, geteuid, setgid, setuid};

use super::Error;

/// The user that distributions make for PostgreSQL.
const POSTGRES: &str = "postgres";
/// What container images without a shell call `nonroot`.
const NONROOT: Uid = Uid::from_raw(65_532);
/// There on practically every system.
const NOBODY: &str = "nobody";

/// An unprivileged user.
#[derive(Clone, Debug)]
pub(super) struct ServiceUser {
    name: String,
    pub(super) uid: Uid,
    pub(super) gid: Gid,
}

impl ServiceUser {
    /// The user to become; `None` where this process is not root's.
    ///
    /// PostgreSQL's programs look up the name of the user that they run as, and fail
    /// without one, so an id that has no entry is only the last resort.
    pub(super) fn needed() -> Option<Self> {
        if !geteuid().is_root() {
            return None;
        }
        let known = [User::from_name(POSTGRES), User::from_uid(NONROOT), User::from_name(NOBODY)];
        let known = known.into_iter().flatten().flatten().find(|user| !user.uid.is_root());
        Some(known.map_or(
            Self { name: "nonroot".to_owned(), uid: NONROOT, gid: Gid::from_raw(NONROOT.as_raw()) },
            |User { name, uid, gid, .. }| Self { name, uid, gid },
        ))
    }

    /// Becomes this user for good. So do threads that are there already, such as the log's:
    /// the C library sees to that (nptl(7), setuid(2)).
    pub(super) fn assume(&self) -> Result<(), Error> {
        self.assume_groups()
            .and_then(|()| setgid(self.gid))
            .and_then(|()| setuid(self.uid))
            .map_err(|errno| Error::DropRoot { user: self.to_string(), source: errno.into() })
    }

    #[cfg(not(target_vendor = "apple"))]
    fn assume_groups(&self) -> nix::Result<()> {
        nix::unistd::setgroups(&[self.gid])
    }

    /// Nothing to call there: root's supplementary groups stay, which the owner of the
    /// folders, and so PostgreSQL, does not mind.
    #[cfg(target_vendor = "apple")]
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "as on other systems")]
    fn assume_groups(&self) -> nix::Result<()> {
        Ok(())
    }
}

impl fmt::Display for ServiceUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the user {} (uid {})", self.name, self.uid)
    }
}

/// The user that this process runs as now, for messages.
pub(super) fn current_user() -> String {
    let uid = geteuid();
    match User::from_uid(uid) {
        Ok(Some(user)) => format!("the user {} (uid {uid})", user.name),
        _ => format!("the user with uid {uid}"),
    }
}

/// The id of the user that this process runs as now, if that user has no name.
pub(super) fn nameless_user() -> Option<u32> {
    let uid = geteuid();
    matches!(User::from_uid(uid), Ok(None)).then_some(uid.as_raw())
}
