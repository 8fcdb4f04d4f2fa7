//! The table of all methods and who may call them.
//!
//! The methods of the API come from the option `fastzero.access.v1.access` in `proto/`:
//! `build.rs` writes the table, and the build fails for a method without it. The methods of
//! health and reflection come from the descriptors of the crates that serve them; they are
//! public and need no database.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use prost::Message;
use prost_types::FileDescriptorSet;

use crate::types::error_chain::BoxError;

/// The longest time for which a reflection stream may be open: longer than any tool needs, and
/// a limit for clients without credentials.
///
/// Test: `reflection_streams_end_after_their_maximum_age`.
pub(crate) const MAX_REFLECTION_STREAM_AGE: Duration = Duration::from_secs(30);

/// A method, and what the layers around it need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    /// The path of the HTTP/2 request: `/package.Service/Method`.
    pub(crate) path: &'static str,
    /// Who may call the method.
    pub(crate) access: Access,
    /// The scope that a credential other than a session needs.
    pub(crate) scope: Option<&'static str>,
    /// Whether the response is a stream.
    pub(crate) server_streaming: bool,
    /// Whether a response may have up to 1 MiB.
    pub(crate) large_response: bool,
    /// The system service that the method belongs to; `None` for methods of the API.
    pub(crate) system: Option<System>,
}

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Anyone.
    Public,
    /// The owner of a session, or of a personal access token that has the scope of the method.
    Caller,
    /// The owner of a session.
    Session,
}

/// The services that every server has, and that are there before the database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum System {
    /// `grpc.health.v1.Health`.
    Health,
    /// `grpc.reflection`.
    Reflection,
}

impl Access {
    /// Returns the name of the level, as `proto/` has it without its prefix.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Public => "PUBLIC",
            Self::Caller => "CALLER",
            Self::Session => "SESSION",
        }
    }
}

/// The methods of the API, in the order of `proto/`.
pub(crate) static METHODS: &[Method] = &include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// Returns the scopes of all methods, in alphabetical order.
pub(crate) fn scopes() -> Vec<&'static str> {
    let scopes: BTreeSet<_> = METHODS.iter().filter_map(|method| method.scope).collect();
    scopes.into_iter().collect()
}

impl Method {
    /// Returns the name as metrics and logs have it: `package.Service/Method`.
    pub(crate) fn name(&self) -> &'static str {
        self.path.strip_prefix('/').unwrap_or(self.path)
    }
}

/// All methods, by path.
#[derive(Debug)]
pub(crate) struct MethodTable(HashMap<&'static str, Method>);

impl MethodTable {
    /// Creates the table: the API, and the system services.
    ///
    /// # Errors
    /// If a descriptor set of a system service cannot be read.
    pub(crate) fn new() -> Result<Self, BoxError> {
        let mut table = Self(METHODS.iter().map(|method| (method.path, *method)).collect());
        table.add_system(System::Health, tonic_health::pb::FILE_DESCRIPTOR_SET)?;
        for set in [
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            table.add_system(System::Reflection, set)?;
        }
        Ok(table)
    }

    fn add_system(&mut self, system: System, descriptors: &[u8]) -> Result<(), BoxError> {
        for file in FileDescriptorSet::decode(descriptors)?.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    // Once for each server, which lives as long as the process.
                    let path: &'static str = path.leak();
                    let method = Method {
                        path,
                        access: Access::Public,
                        scope: None,
                        server_streaming: method.server_streaming(),
                        large_response: false,
                        system: Some(system),
                    };
                    self.0.insert(path, method);
                }
            }
        }
        Ok(())
    }

    /// Returns the method at a path. Returns `None` if the server has no such method.
    pub(crate) fn get(&self, path: &str) -> Option<Method> {
        self.0.get(path).copied()
    }

    /// Returns all methods.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Method> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_the_access_of_the_proto_files() {
        let table = MethodTable::new().expect("descriptors");
        let rule = |path| table.get(path).map(|method| (method.access, method.scope));
        let login = rule("/fastzero.auth.v1.AuthService/Login");
        assert_eq!(login, Some((Access::Public, None)));
        let get_todo = rule("/fastzero.todo.v1.TodoService/GetTodo");
        assert_eq!(get_todo, Some((Access::Caller, Some("todo.read"))));
        let delete_user = rule("/fastzero.user.v1.UserService/DeleteUser");
        assert_eq!(delete_user, Some((Access::Session, None)));
        assert_eq!(rule("/fastzero.todo.v1.TodoService/Unknown"), None);
        assert_eq!(rule("fastzero.todo.v1.TodoService/GetTodo"), None);
    }

    #[test]
    fn system_methods_are_in_the_table() {
        let table = MethodTable::new().expect("descriptors");
        for (path, system, streaming) in [
            ("/grpc.health.v1.Health/Check", System::Health, false),
            ("/grpc.health.v1.Health/Watch", System::Health, true),
            ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", System::Reflection, true),
        ] {
            let method = table.get(path).expect(path);
            assert_eq!((method.system, method.server_streaming), (Some(system), streaming));
        }
    }
}
