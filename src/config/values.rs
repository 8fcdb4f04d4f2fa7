//! Parsers and defaults of single values.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use clap::builder::TypedValueParser;
use http::Uri;
use ipnet::{IpNet, Ipv4Net};
use secrecy::SecretString;
use tracing_subscriber::filter::{ParseError, Targets};

use super::hashing_threads::cores;

/// Returns an address that a client on this machine can connect to.
pub(crate) fn connect_addr(listen_addr: SocketAddr) -> SocketAddr {
    let ip = match listen_addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen_addr.port())
}

/// Parses log levels, with spaces around them. A character that no module has is a mistake, which
/// would mute the log without a word.
pub(super) fn parse_log_levels(text: &str) -> Result<Targets, String> {
    let directives: Vec<_> =
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    for directive in &directives {
        let (target, _level) = directive.split_once('=').unwrap_or((directive, ""));
        if !target.chars().all(|c| c.is_alphanumeric() || "_:.".contains(c)) {
            return Err("invalid filter: modules are like fast_zero or fast_zero::audit, and \
                        commas separate levels"
                .to_owned());
        }
    }
    directives.join(",").parse().map_err(|error: ParseError| error.to_string())
}

pub(super) fn secret() -> impl TypedValueParser<Value = SecretString> {
    clap::builder::StringValueParser::new()
        .try_map(|text| Ok::<_, Infallible>(SecretString::from(text)))
}

pub(super) fn parse_address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse()
        .map_err(|_| "must be an IP address and a port, like 127.0.0.1:50051 or [::1]:50051")
}

pub(super) fn parse_otlp_endpoint(text: &str) -> Result<Uri, &'static str> {
    let uri = text.parse().ok().filter(|uri: &Uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && matches!(uri.path(), "" | "/")
    });
    uri.ok_or("must be a gRPC URL, like http://localhost:4317 or https://collector:4317")
}

/// Parses a network, or one address.
pub(super) fn parse_network(text: &str) -> Result<IpNet, &'static str> {
    let text = text.trim();
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let network =
        network.map_err(|_| "must be a network, like 10.0.0.0/8 or fd00::/8, or an IP address")?;
    Ok(to_canonical(network))
}

/// Returns a network of IPv4-mapped IPv6 addresses as one of IPv4: so are the addresses of peers.
fn to_canonical(network: IpNet) -> IpNet {
    let mapped = match network {
        IpNet::V6(network) => {
            network.addr().to_ipv4_mapped().zip(network.prefix_len().checked_sub(96))
        }
        IpNet::V4(_) => None,
    };
    let network_v4 = mapped.and_then(|(address, len)| Ipv4Net::new(address, len).ok());
    network_v4.map_or(network, IpNet::V4)
}

/// Statements take a fraction of a millisecond: a few connections keep all cores of a database
/// busy, and more only make it switch between them.
pub(super) fn default_max_connections() -> u16 {
    cores().saturating_mul(2).clamp(4, 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_network_is_one_of_ipv4() {
        for (text, network) in [
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:10.0.0.1", "10.0.0.1/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/0", "::/0"),
            (" fd00::/8", "fd00::/8"),
            ("10.0.0.0/8 ", "10.0.0.0/8"),
        ] {
            assert_eq!(
                parse_network(text).map(|network| network.to_string()),
                Ok(network.to_owned())
            );
        }
    }

    #[test]
    fn log_levels_may_have_spaces_but_no_character_that_no_module_has() {
        let plain = parse_log_levels("warn,fast_zero::audit=info").expect("valid");
        assert_eq!(parse_log_levels(" warn , fast_zero::audit=info, ").expect("valid"), plain);
        for invalid in ["info;debug", "info debug", "fast-zero=debug", "[call]=info", "a@b"] {
            let error = parse_log_levels(invalid).expect_err(invalid);
            assert!(error.contains("invalid filter"), "{error}");
        }
    }
}
