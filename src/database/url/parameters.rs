//! The parameters of libpq: which the service supports, and which of their values.

use std::{env, fs::File, net::IpAddr, path::Path};

use crate::types::{error_chain::BoxError, secret_text::display_path};

/// A parameter of libpq (manual of PostgreSQL 18, section 32.1.2), and its environment variable.
pub(super) struct Parameter {
    pub(super) name: &'static str,
    variable: &'static str,
    support: Support,
}

/// Whether the service supports a parameter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Support {
    Supported,
    /// Concerns neither security nor the target: the service has timeouts of its own.
    Ignored,
    /// Only these values, which describe what the service does anyway.
    Only(&'static [&'static str]),
}

const fn supported(name: &'static str, variable: &'static str) -> Parameter {
    Parameter { name, variable, support: Support::Supported }
}

const fn ignored(name: &'static str, variable: &'static str) -> Parameter {
    Parameter { name, variable, support: Support::Ignored }
}

const fn only(
    name: &'static str,
    variable: &'static str,
    values: &'static [&'static str],
) -> Parameter {
    Parameter { name, variable, support: Support::Only(values) }
}

pub(super) const PARAMETERS: [Parameter; 52] = [
    supported("host", "PGHOST"),
    supported("hostaddr", "PGHOSTADDR"),
    supported("port", "PGPORT"),
    supported("dbname", "PGDATABASE"),
    supported("user", "PGUSER"),
    supported("password", "PGPASSWORD"),
    supported("sslmode", "PGSSLMODE"),
    supported("sslrootcert", "PGSSLROOTCERT"),
    supported("sslcert", "PGSSLCERT"),
    supported("sslkey", "PGSSLKEY"),
    supported("application_name", "PGAPPNAME"),
    supported("options", "PGOPTIONS"),
    // Of sqlx.
    supported("statement-cache-capacity", ""),
    ignored("connect_timeout", "PGCONNECT_TIMEOUT"),
    ignored("fallback_application_name", ""),
    ignored("keepalives", ""),
    ignored("keepalives_count", ""),
    ignored("keepalives_idle", ""),
    ignored("keepalives_interval", ""),
    ignored("tcp_user_timeout", ""),
    only("channel_binding", "PGCHANNELBINDING", &["disable", "prefer"]),
    only("client_encoding", "PGCLIENTENCODING", &["UTF8", "UTF-8", "utf8", "utf-8"]),
    only("gssdelegation", "PGGSSDELEGATION", &["0"]),
    only("gssencmode", "PGGSSENCMODE", &["disable", "prefer"]),
    only("gsslib", "PGGSSLIB", &[]),
    only("krbsrvname", "PGKRBSRVNAME", &[]),
    only("load_balance_hosts", "PGLOADBALANCEHOSTS", &["disable"]),
    // sqlx speaks version 3.0 of the protocol.
    only("max_protocol_version", "PGMAXPROTOCOLVERSION", &["3.0", "3.2", "latest"]),
    only("min_protocol_version", "PGMINPROTOCOLVERSION", &["3.0"]),
    only("oauth_client_id", "", &[]),
    only("oauth_client_secret", "", &[]),
    only("oauth_issuer", "", &[]),
    only("oauth_scope", "", &[]),
    only("passfile", "PGPASSFILE", &[]),
    only("replication", "", &["false", "off", "no", "0"]),
    only("require_auth", "PGREQUIREAUTH", &[]),
    only("requirepeer", "PGREQUIREPEER", &[]),
    only("requiressl", "PGREQUIRESSL", &["0"]),
    only("scram_client_key", "", &[]),
    only("scram_server_key", "", &[]),
    only("service", "PGSERVICE", &[]),
    only("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", &["TLSv1.3"]),
    only("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", &["TLSv1", "TLSv1.1", "TLSv1.2"]),
    only("sslcertmode", "PGSSLCERTMODE", &["allow"]),
    only("sslcompression", "PGSSLCOMPRESSION", &["0"]),
    only("sslcrl", "PGSSLCRL", &[]),
    only("sslcrldir", "PGSSLCRLDIR", &[]),
    only("sslkeylogfile", "", &[]),
    only("sslnegotiation", "PGSSLNEGOTIATION", &["postgres"]),
    only("sslpassword", "", &[]),
    only("sslsni", "PGSSLSNI", &["1"]),
    only("target_session_attrs", "PGTARGETSESSIONATTRS", &["any"]),
];

/// Other names of parameters, which sqlx accepts.
pub(super) const ALIASES: [(&str, &str); 5] = [
    ("ssl-mode", "sslmode"),
    ("ssl-root-cert", "sslrootcert"),
    ("ssl-ca", "sslrootcert"),
    ("ssl-cert", "sslcert"),
    ("ssl-key", "sslkey"),
];

const SSL_MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

/// Returns `true` for the variables of libpq, which fill what the URL omits.
pub(crate) fn is_variable(name: &str) -> bool {
    !name.is_empty() && PARAMETERS.iter().any(|parameter| parameter.variable == name)
}

/// Returns `true` for a parameter that sqlx knows.
pub(super) fn is_passed_on(name: &str) -> bool {
    let parameter = PARAMETERS.iter().find(|parameter| parameter.name == name);
    parameter.is_none_or(|parameter| parameter.support == Support::Supported)
}

impl Parameter {
    /// Returns the variable and its value. An empty variable counts as not set.
    pub(super) fn environment_value(&self) -> Result<Option<(&'static str, String)>, BoxError> {
        let Some(value) = env::var_os(self.variable).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        // sqlx ignores such a variable, even if it demands security.
        let not_text = |_| format!("{} must be UTF-8 text", self.variable);
        Ok(Some((self.variable, value.into_string().map_err(not_text)?)))
    }

    /// Rejects a value that the service cannot use. `source` is the parameter or its variable.
    pub(super) fn check(&self, source: &str, value: &str) -> Result<(), BoxError> {
        let error = match (self.support, self.name) {
            // sqlx supports the password file of libpq as a variable only.
            (Support::Only(_), "passfile") if source == self.variable => return Ok(()),
            (Support::Only([]), _) => unsupported(source),
            (Support::Only(values), _) if !values.contains(&value) => {
                unsupported(&format!("{source} with another value than {}", values.join(" or ")))
            }
            (_, "sslmode") if !SSL_MODES.contains(&value) => {
                format!("{source} must be one of {}", SSL_MODES.join(", "))
            }
            (_, "host" | "hostaddr" | "port") if value.contains(',') && !value.starts_with('/') => {
                format!(
                    "{source} must name one host: use a load balancer or a DNS name for several"
                )
            }
            (_, "port") if !value.parse().is_ok_and(|port: u16| port > 0) => {
                format!("{source} must be a number from 1 to 65535")
            }
            (_, "hostaddr") if value.parse::<IpAddr>().is_err() => {
                format!("{source} must be an IP address")
            }
            (_, "sslrootcert" | "sslcert" | "sslkey") => return check_file(source, value),
            _ => return Ok(()),
        };
        Err(error.into())
    }
}

/// Rejects a file that cannot be read, and libpq's name for the CAs of the system. A variable may
/// contain the PEM itself.
fn check_file(source: &str, value: &str) -> Result<(), BoxError> {
    if value.trim().starts_with("-----BEGIN") {
        return Ok(());
    }
    if value == "system" {
        let message = "must be a file: omit it to trust the public CAs, with sslmode=verify-full";
        return Err(format!("{source} {message}").into());
    }
    match File::open(value) {
        Ok(_) => Ok(()),
        Err(error) => {
            let path = display_path(Path::new(value));
            Err(format!("{source} cannot be read from {path}: {error}").into())
        }
    }
}

pub(super) fn unsupported(what: &str) -> String {
    let of = |support| {
        let parameters = PARAMETERS.iter().filter(move |parameter| parameter.support == support);
        parameters.map(|parameter| parameter.name).collect::<Vec<_>>().join(", ")
    };
    let (supported, ignored) = (of(Support::Supported), of(Support::Ignored));
    format!("{what} is not supported: supported are {supported}; ignored are {ignored}")
}
