//! The user that PostgreSQL runs as if this process is started as root, which PostgreSQL
//! refuses.

use std::fmt;

use nix::unistd::{Gid, Uid, User, geteuid, setgid, setuid};

use crate::{App, Error};

/// The user that distributions create for PostgreSQL.
const POSTGRES: &str = "postgres";
/// The user `nonroot` of container images without a shell.
const NONROOT: Uid = Uid::from_raw(65_532);
/// A user that exists on nearly every system.
const NOBODY: &str = "nobody";

/// An unprivileged user.
#[derive(Clone, Debug)]
pub(crate) struct ServiceUser {
    name: String,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
}

impl ServiceUser {
    /// Returns the user to switch to, or `None` if this process does not run as root.
    ///
    /// PostgreSQL's programs look up the name of their user and fail without one, so an ID
    /// without an entry is the last resort.
    pub(crate) fn detect() -> Option<Self> {
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

    /// Switches this process to the user for good. The C library applies the change to the
    /// threads that already run, such as the log's (nptl(7), setuid(2)).
    pub(crate) fn switch_to(&self, app: &App) -> Result<(), Error> {
        let switched =
            self.set_groups().and_then(|()| setgid(self.gid)).and_then(|()| setuid(self.uid));
        switched.map_err(|errno| Error::DropRoot {
            os_user: self.to_string(),
            alternative: app.alternative,
            source: errno.into(),
        })
    }

    #[cfg(not(target_vendor = "apple"))]
    fn set_groups(&self) -> nix::Result<()> {
        nix::unistd::setgroups(&[self.gid])
    }

    /// Does nothing: nix has no `setgroups` for macOS. Root's supplementary groups stay,
    /// which does not matter to the owner of the directories, and so to PostgreSQL.
    #[cfg(target_vendor = "apple")]
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "as on other systems")]
    fn set_groups(&self) -> nix::Result<()> {
        Ok(())
    }
}

impl fmt::Display for ServiceUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (uid {})", self.name, self.uid)
    }
}

/// Returns name and ID of the user that this process runs as, for messages.
pub(crate) fn current_user() -> String {
    let uid = geteuid();
    match User::from_uid(uid) {
        Ok(Some(user)) => format!("{} (uid {uid})", user.name),
        _ => format!("uid {uid}"),
    }
}

/// Returns the ID of the user that this process runs as if that user has no name.
pub(crate) fn nameless_user() -> Option<u32> {
    let uid = geteuid();
    matches!(User::from_uid(uid), Ok(None)).then_some(uid.as_raw())
}
