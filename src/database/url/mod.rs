//! The URL of a database, as libpq reads it.
//!
//! sqlx ignores parameters that it does not know and logs them with their values, and takes a
//! part of an unencoded password for the host. So this parser reads the URL, and passes only what
//! is supported on to sqlx.

mod parameters;

use std::collections::BTreeMap;

use sqlx::postgres::{PgConnectOptions, PgSslMode};

pub(crate) use self::parameters::is_variable;
use self::parameters::{ALIASES, PARAMETERS, is_passed_on, unsupported};
use crate::types::error_chain::BoxError;

/// What to do about a URL that other programs could read differently. The URL is not shown,
/// because what it contains at any position may be a part of the password.
const ENCODE: &str = "encode each of : / ? # [ ] @ % and space in a user, a password or a \
                      database, and each of & # % + and space in a parameter, like %40 for @";

/// What to do about `verify-ca` without a CA, which libpq rejects as well.
const VERIFY_CA_WITHOUT_CA: &str = "sslmode=verify-ca needs sslrootcert, the CA bundle of the \
                                    server; for a certificate of a public CA, use \
                                    sslmode=verify-full";

/// Why `hostaddr` hinders `verify-full`, and what to do about it.
const ADDRESS_WITH_VERIFY_FULL: &str = "is not supported with sslmode=verify-full, which would \
                                        verify the certificate for the address instead of the \
                                        host: omit it, or set host to the address if the \
                                        certificate contains it";

/// The name of a parameter, and its value.
type Values = BTreeMap<String, String>;

/// Parses the URL of a database. `postgres://` and `postgresql://` are equal, and a driver as in
/// `postgresql+psycopg://` (SQLAlchemy's notation) is ignored. `PGPASSWORD` and the other
/// variables of libpq fill what the URL leaves out.
///
/// # Errors
///
/// If the URL is ambiguous, or it or a variable requires something that is not supported. The
/// message contains nothing of the URL but names of parameters of libpq, and paths and values
/// that are not secret.
pub(crate) fn parse_url(url: &str) -> Result<PgConnectOptions, BoxError> {
    // Editors start a file with a byte order mark.
    let mut values = split_url(url.trim_start_matches('\u{feff}').trim())?;
    let mut effective = BTreeMap::new();
    for parameter in &PARAMETERS {
        let in_url = values.get(parameter.name).map(|value| (parameter.name, value.clone()));
        let set = match in_url {
            Some(set) => Some(set),
            None => parameter.environment_value()?,
        };
        if let Some((source, value)) = set {
            parameter.check(source, &value)?;
            effective.insert(parameter.name, (source, value));
        }
    }
    // Of a variable, too: sqlx would connect to the host of the URL.
    if let Some((source, address)) = effective.remove("hostaddr") {
        // sqlx knows one name only, for the connection and for the certificate.
        if effective.get("sslmode").is_some_and(|(_, mode)| mode == "verify-full") {
            return Err(format!("{source} {ADDRESS_WITH_VERIFY_FULL}").into());
        }
        values.remove("host");
        values.insert("hostaddr".to_owned(), address);
    }
    let pairs = values.iter().filter(|(name, _)| is_passed_on(name));
    let query: Vec<_> =
        pairs.map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
    let options: PgConnectOptions = format!("postgresql:///?{}", query.join("&")).parse()?;
    let options = with_ssl_mode_of_libpq(options, effective.contains_key("sslrootcert"))?;
    // No column is a floating-point number, and PgBouncer rejects the parameter.
    Ok(options.extra_float_digits(None))
}

/// Sets the `sslmode` that libpq uses where sqlx differs from it.
fn with_ssl_mode_of_libpq(
    options: PgConnectOptions,
    has_ca: bool,
) -> Result<PgConnectOptions, BoxError> {
    let is_socket = options.get_socket().is_some() || options.get_host().starts_with('/');
    match options.get_ssl_mode() {
        // A server has no TLS there, and sqlx would require it.
        _ if is_socket => Ok(options.ssl_mode(PgSslMode::Disable)),
        PgSslMode::Require if has_ca => Ok(options.ssl_mode(PgSslMode::VerifyCa)),
        // sqlx would accept a certificate of any public CA for any host.
        PgSslMode::VerifyCa if !has_ca => Err(VERIFY_CA_WITHOUT_CA.into()),
        _ => Ok(options),
    }
}

/// Sets the name that `pg_stat_activity` shows, if neither the URL nor `PGAPPNAME` does.
pub(crate) fn with_application_name(options: PgConnectOptions) -> PgConnectOptions {
    match options.get_application_name() {
        None | Some("") => options.application_name("fast-zero"),
        Some(_) => options,
    }
}

/// Splits a URL into its parts by their names in libpq.
fn split_url(url: &str) -> Result<Values, BoxError> {
    let (scheme, rest) = url.split_once("://").ok_or("it is no URL")?;
    let (scheme, _driver) = scheme.split_once('+').unwrap_or((scheme, ""));
    if !matches!(scheme, "postgres" | "postgresql") {
        return Err("its scheme is neither postgres nor postgresql".into());
    }
    let ambiguous = || BoxError::from(ENCODE);
    let is_plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '#';
    if !rest.chars().all(is_plain) {
        return Err(ambiguous());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user_info, host) = match authority.split_once('@') {
        Some((user_info, host)) => (Some(user_info), host),
        None => (None, authority),
    };
    // An @ after the user belongs to a password with an unencoded character.
    let has_other_at = host.contains('@') || path.contains('@');
    if has_other_at || (user_info.is_none() && query.contains('@')) {
        return Err(ambiguous());
    }
    let mut values = Values::new();
    let mut add = |name: &'static str, text: &str| -> Result<(), BoxError> {
        if !text.is_empty() {
            values.insert(name.to_owned(), decode(text).ok_or_else(ambiguous)?);
        }
        Ok(())
    };
    let (user, password) =
        user_info.map_or(("", ""), |text| text.split_once(':').unwrap_or((text, "")));
    add("user", user)?;
    add("password", password)?;
    let (host, port) = split_host(host).ok_or("it has no valid host and port")?;
    add("host", host)?;
    add("port", port)?;
    add("dbname", path)?;
    // The parameters precede the other parts: Cloud SQL's clients put the socket there.
    for (name, value) in split_query(query)? {
        values.insert(name, value);
    }
    Ok(values)
}

/// Splits a host from its port. An IPv6 address has brackets.
fn split_host(text: &str) -> Option<(&str, &str)> {
    let (host, after) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    if after.is_empty() { Some((host, "")) } else { Some((host, after.strip_prefix(':')?)) }
}

fn split_query(query: &str) -> Result<Values, BoxError> {
    let mut values = Values::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        // A form encodes a space as +, and libpq does not.
        let pair = pair.split_once('=').filter(|(_, value)| !value.contains('+'));
        let (name, value) = pair.ok_or(ENCODE)?;
        let (name, value) = decode(name).zip(decode(value)).ok_or(ENCODE)?;
        let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
        let name = alias.map_or(name, |(_, name)| (*name).to_owned());
        let is_known = PARAMETERS.iter().any(|parameter| parameter.name == name);
        let is_option = name.starts_with("options[") && name.ends_with(']');
        if !is_known && !is_option {
            return Err(unsupported("an unknown parameter").into());
        }
        if values.insert(name.clone(), value).is_some() {
            return Err(if is_known {
                format!("the parameter {name} must be set once").into()
            } else {
                "each of the parameters options[…] must be set once".into()
            });
        }
    }
    Ok(values)
}

/// Decodes percent-encoding; `None` if it is invalid.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut parts = text.split('%');
    bytes.extend_from_slice(parts.next()?.as_bytes());
    for part in parts {
        let digits =
            part.get(..2).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok().filter(|byte| *byte != 0)?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

/// Encodes everything but letters and digits.
fn encode(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use sqlx::ConnectOptions;

    use super::*;

    /// Returns the error of an invalid URL.
    fn rejected(url: &str) -> String {
        parse_url(url).expect_err(url).to_string()
    }

    #[test]
    fn urls_of_all_dialects_are_parsed() {
        for scheme in ["postgres", "postgresql", "postgresql+psycopg", "postgresql+asyncpg"] {
            let options =
                parse_url(&format!("{scheme}://app_user:p%40ss@db:5433/app_db?sslmode=disable"))
                    .expect("a URL");
            assert_eq!(options.get_host(), "db");
            assert_eq!(options.get_port(), 5433);
            assert_eq!(options.get_username(), "app_user");
            assert_eq!(options.get_database(), Some("app_db"));
        }
        for invalid in ["", "db", "mysql://db", "postgresql:/db", "sqlite+aiosqlite:///db"] {
            assert!(parse_url(invalid).is_err(), "{invalid}");
        }
    }

    /// Returns what sqlx connects to: user, password, socket or host, port, and database.
    fn target(url: &str) -> [String; 5] {
        let options = parse_url(url).unwrap_or_else(|error| panic!("{url}: {error}"));
        // An IPv6 address has no brackets in the options, and sqlx writes none.
        let shown = options.clone().host("h").to_url_lossy();
        let socket = options.get_socket().map(|socket| socket.display().to_string());
        [
            options.get_username().to_owned(),
            decode(shown.password().unwrap_or_default()).expect("valid"),
            socket.unwrap_or_else(|| options.get_host().to_owned()),
            options.get_port().to_string(),
            options.get_database().unwrap_or_default().to_owned(),
        ]
    }

    #[test]
    fn urls_have_the_parts_that_libpq_reads() {
        for (url, parts) in [
            ("u:p@h:1/d", ["u", "p", "h", "1", "d"]),
            ("u:p:q@h/d", ["u", "p:q", "h", "5432", "d"]),
            ("u%40v:%40%2F%3A%3F%23%25%20@h/d%20e", ["u@v", "@/:?#% ", "h", "5432", "d e"]),
            ("u:p@[::1]:1/d", ["u", "p", "::1", "1", "d"]),
            ("u:p@%2Fvar%2Frun:1/d", ["u", "p", "/var/run", "1", "d"]),
            // Cloud SQL, as libpq and as Prisma write it.
            ("u:p@/d?host=/cloudsql/a:b:c", ["u", "p", "/cloudsql/a:b:c", "5432", "d"]),
            ("u:p@localhost/d?host=/cloudsql/a:b:c", ["u", "p", "/cloudsql/a:b:c", "5432", "d"]),
            ("/?host=h&port=1&user=u&password=p%26&dbname=d", ["u", "p&", "h", "1", "d"]),
            ("u@v/?password=p%40", ["u", "p@", "v", "5432", ""]),
            ("u:p@h/d?hostaddr=127.0.0.1", ["u", "p", "127.0.0.1", "5432", "d"]),
            ("u:p@h/d?connect_timeout=1&keepalives=0", ["u", "p", "h", "5432", "d"]),
            (
                "u:p@h/d?channel_binding=prefer&sslnegotiation=postgres&max_protocol_version=3.2",
                ["u", "p", "h", "5432", "d"],
            ),
        ] {
            assert_eq!(target(&format!("postgresql://{url}")), parts.map(str::to_owned), "{url}");
        }
        let options = "application_name=a%20b&options=-c%20a%3Db&options[c]=d&sslmode=disable";
        let options = parse_url(&format!("postgres://h/?{options}")).expect("a URL");
        assert_eq!(options.get_application_name(), Some("a b"));
        assert_eq!(options.get_options(), Some("-c a=b -c c=d"));
        assert!(matches!(options.get_ssl_mode(), PgSslMode::Disable));
    }

    #[test]
    fn the_application_name_of_the_url_precedes_the_default() {
        for (query, expected) in
            [("", "fast-zero"), ("?application_name=", "fast-zero"), ("?application_name=a", "a")]
        {
            let options = parse_url(&format!("postgres://h/{query}")).expect("a URL");
            let options = with_application_name(options);
            assert_eq!(options.get_application_name(), Some(expected), "{query}");
        }
    }

    #[test]
    fn ambiguous_urls_are_rejected_and_not_shown() {
        for rest in [
            "app:4711?hidden@db/app",
            "app:4711?hidden=1@db/app",
            "app:4711?user=hidden@db/app",
            "app:4711/hidden@db/app",
            "app:4711#hidden@db/app",
            "app:hidden#db",
            "app:1@hidden@db/app",
            "app:1@hidden/2@db/app",
            "app:1@hidden?2@db/app",
            "app:hidden%@db/app",
            "app:hidden%zz@db/app",
            "app:hidden%00@db/app",
            "app:hidden%ff@db/app",
            "app:hid den@db/app",
            "app:hid\tden@db/app",
            "app:hid\nden@db/app",
            "db/app?password=hid+den",
            "db/app?hidden",
        ] {
            let error = rejected(&format!("postgresql://{rest}"));
            let is_unknown = error.contains("an unknown parameter");
            assert!(error == ENCODE || is_unknown, "{rest}: {error}");
            assert!(!error.contains("hidden") && !error.contains("4711"), "{rest}: {error}");
        }
        for rest in ["app:p@db:hidden/app", "app:p@[hidden/app", "app:p@[::1]hidden/app"] {
            let error = rejected(&format!("postgresql://{rest}"));
            assert!(!error.contains("hidden"), "{rest}: {error}");
        }
    }

    #[test]
    fn what_changes_security_or_the_target_is_rejected_if_unsupported() {
        for (query, named) in [
            ("sslmode=verify_full", "sslmode must be one of disable, allow, prefer, require, "),
            ("sslmode=", "sslmode must be one of"),
            ("ssl-mode=verify_full", "sslmode must be one of"),
            ("channel_binding=require", "channel_binding with another value than disable or"),
            ("require_auth=scram-sha-256", "require_auth is not supported: supported are host, "),
            ("ssl_min_protocol_version=TLSv1.3", "ssl_min_protocol_version with another"),
            ("target_session_attrs=read-write", "target_session_attrs with another value than any"),
            ("sslpassword=hidden", "sslpassword is not supported"),
            ("service=hidden", "service is not supported"),
            ("min_protocol_version=3.2", "min_protocol_version with another value than 3.0 is"),
            ("oauth_client_secret=hidden", "oauth_client_secret is not supported"),
            ("scram_client_key=hidden", "scram_client_key is not supported"),
            ("sslkeylogfile=hidden", "sslkeylogfile is not supported"),
            ("passfile=hidden", "passfile is not supported"),
            ("pgbouncer=hidden", "an unknown parameter is not supported"),
            ("HOST=hidden", "an unknown parameter is not supported"),
            ("host=a,b", "host must name one host"),
            ("host=a&host=b", "host must be set once"),
            ("ssl-mode=require&sslmode=disable", "sslmode must be set once"),
            ("port=1,2", "port must name one host"),
            ("port=0", "port must be a number from 1"),
            ("hostaddr=a", "hostaddr must be an IP address"),
            ("hostaddr=::1&sslmode=verify-full", "hostaddr is not supported with sslmode=verify-f"),
            ("sslrootcert=system", "sslrootcert must be a file: omit it to trust the public CAs"),
            ("sslrootcert=/none/ca.pem", "sslrootcert cannot be read from /none/ca.pem"),
            ("sslkey=/none/key.pem", "sslkey cannot be read from /none/key.pem"),
        ] {
            let error = rejected(&format!("postgresql://app:p@db/app?{query}"));
            assert!(error.contains(named), "{query}: {error}");
            assert!(!error.contains("hidden"), "{query}: {error}");
        }
        for several in ["a,b", "a:1,b:2", "[::1]:1,[::2]:1"] {
            let error = rejected(&format!("postgresql://app:hidden@{several}/app"));
            assert!(!error.contains("hidden"), "{error}");
        }
    }

    #[test]
    fn a_ca_makes_require_verify_the_certificate() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        for (sslmode, verifies) in [("prefer", false), ("require", true), ("verify-ca", true)] {
            let url = format!("postgresql://db/app?sslmode={sslmode}&sslrootcert={file}");
            let options = parse_url(&url).expect("a URL");
            let is_verifying = matches!(options.get_ssl_mode(), PgSslMode::VerifyCa);
            assert_eq!(is_verifying, verifies, "{sslmode}");
        }
        let options = parse_url("postgresql://db/app?sslmode=require").expect("a URL");
        assert!(matches!(options.get_ssl_mode(), PgSslMode::Require));
    }

    #[test]
    fn verify_ca_requires_a_ca() {
        assert_eq!(rejected("postgresql://db/app?sslmode=verify-ca"), VERIFY_CA_WITHOUT_CA);
        // It verifies the host name, too.
        let options = parse_url("postgresql://db/app?sslmode=verify-full").expect("a URL");
        assert!(matches!(options.get_ssl_mode(), PgSslMode::VerifyFull));
    }

    #[test]
    fn a_socket_ignores_sslmode() {
        for host in ["%2Fvar%2Frun/app?", "/app?host=/var/run&"] {
            for sslmode in ["require", "verify-ca", "verify-full"] {
                let url = format!("postgresql://{host}sslmode={sslmode}");
                let options = parse_url(&url).expect("a URL");
                assert!(matches!(options.get_ssl_mode(), PgSslMode::Disable), "{url}");
            }
        }
    }
}
