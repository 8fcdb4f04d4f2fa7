//! Random secrets.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::SecretString;

use crate::Error;

/// The entropy of a secret, as long as the output of SHA-256, which derives keys from it.
const ENTROPY_BYTES: usize = 32;

/// Returns a new secret of 43 characters, none of which needs escaping.
pub(crate) fn random_secret() -> Result<SecretString, Error> {
    let mut bytes = [0; ENTROPY_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Rng)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes).into())
}
