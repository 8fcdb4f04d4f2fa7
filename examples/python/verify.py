"""Verifies access tokens with the public keys of fast-zero, without a call of it.

`Verifier` is meant to be copied.
"""

import json
import logging
import os
import sys
import threading
import time
import urllib.request

import jwt

# Seconds. The interval is the minimum time between fetches after the first one, also if they fail.
# The timeout is for each socket operation: a server that sends slowly extends the fetch.
MAX_AGE, FETCH_INTERVAL, FETCH_TIMEOUT = 3600, 60, 3

# Bytes. A larger key set is truncated, and then is no JSON.
MAX_KEY_SET_SIZE = 64 * 1024


class Verifier:
    """Verifies access tokens. Fetches the keys first: a service does that before it serves."""

    def __init__(self, url, issuer="fast-zero", audience="fast-zero"):
        self._url, self._issuer, self._audience = url, issuer, audience
        self._lock = threading.Lock()
        self._next_fetch_at = time.monotonic()
        self._fetch()

    def verify(self, token):
        """Returns the claims of a valid access token."""
        header = jwt.get_unverified_header(token)
        if header.get("typ") != "at+jwt" or "crit" in header:
            raise jwt.InvalidTokenError("not an access token")
        return jwt.decode(
            token, self._key(header.get("kid")), algorithms=["EdDSA"],
            issuer=self._issuer, audience=self._audience, leeway=5,
            options={"require": ["iss", "aud", "exp", "sub", "sid"]},
        )

    def _key(self, kid):
        now = time.monotonic()
        with self._lock:
            is_stale = now >= self._expires_at or kid not in self._keys
            is_due = is_stale and now >= self._next_fetch_at
            if is_due:
                self._next_fetch_at = now + FETCH_INTERVAL
        if is_due:
            try:
                self._fetch()
            except Exception as error:
                # The last keys stay in use.
                logging.warning("failed to fetch the keys: %s", error)
        if key := self._keys.get(kid):
            return key
        raise jwt.InvalidTokenError("unknown key")

    def _fetch(self):
        with urllib.request.urlopen(self._url, timeout=FETCH_TIMEOUT) as response:
            keys = jwt.PyJWKSet.from_dict(json.loads(response.read(MAX_KEY_SET_SIZE)))
        self._keys = {key.key_id: key for key in keys}
        self._expires_at = time.monotonic() + MAX_AGE


def main():
    default_url = "http://localhost:9464/.well-known/jwks.json"
    verifier = Verifier(os.environ.get("FASTZERO_JWKS_URL", default_url))
    exit_code = 0
    for token in sys.argv[1:]:
        try:
            claims = verifier.verify(token)
        except jwt.PyJWTError as error:
            print("invalid token:", error, file=sys.stderr)
            exit_code = 1
        else:
            print("user:", claims["sub"])
            print("session:", claims["sid"])
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
