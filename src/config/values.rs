//! Parsers and defaults of single values.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
};

use clap::builder::TypedValueParser;
use http::Uri;
use ipnet::IpNet;
use secrecy::SecretString;

/// Returns an address that a client on this machine can connect to.
pub(crate) fn connect_addr(listen_addr: SocketAddr) -> SocketAddr {
    let ip = match listen_addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen_addr.port())
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
    network.map_err(|_| "must be a network, like 10.0.0.0/8 or fd00::/8, or an IP address")
}

fn cores() -> u16 {
    thread::available_parallelism()
        .map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

/// Leaves one core to everything else.
pub(super) fn default_hashing_threads() -> u16 {
    cores().saturating_sub(1).clamp(1, 64)
}

/// Statements take a fraction of a millisecond: a few connections keep all cores of a database
/// busy, and more only make it switch between them.
pub(super) fn default_max_connections() -> u16 {
    cores().saturating_mul(2).clamp(4, 32)
}
