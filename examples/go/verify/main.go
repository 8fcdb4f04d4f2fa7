// Verifies access tokens with the public keys of fast-zero, without a call of it.
//
// newVerifier is meant to be copied.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
)

// claims are those of an access token.
type claims struct {
	jwt.RegisteredClaims
	Session string `json:"sid"`
}

// Validate checks the claims that the parser does not check.
func (c *claims) Validate() error {
	if c.Subject == "" || c.Session == "" {
		return errors.New("sub and sid are required")
	}
	return nil
}

// newVerifier returns a function that returns the claims of a valid access token. It fetches the
// keys first: a service does that before it serves.
func newVerifier(ctx context.Context, url, issuer, audience string) (func(token string) (*claims, error), error) {
	// Fetched again every hour, and for an unknown kid at most once in five minutes. The last keys
	// stay in use while fetches fail.
	keys, err := keyfunc.NewDefaultOverrideCtx(ctx, []string{url}, keyfunc.Override{
		HTTPTimeout:               3 * time.Second,
		NoErrorReturnFirstHTTPReq: new(false),
		RateLimitWaitMax:          3 * time.Second,
	})
	if err != nil {
		return nil, err
	}
	key := func(token *jwt.Token) (any, error) {
		_, isCritical := token.Header["crit"]
		// Without a kid, the library would try each key.
		if token.Header["typ"] != "at+jwt" || isCritical || token.Header["kid"] == nil {
			return nil, errors.New("not an access token")
		}
		return keys.Keyfunc(token)
	}
	// The parser also checks nbf, if there is one.
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"EdDSA"}), jwt.WithIssuer(issuer),
		jwt.WithAudience(audience), jwt.WithExpirationRequired(), jwt.WithLeeway(5*time.Second))
	return func(token string) (*claims, error) {
		claims := &claims{}
		if _, err := parser.ParseWithClaims(token, claims, key); err != nil {
			return nil, err
		}
		return claims, nil
	}, nil
}

func run(ctx context.Context, tokens []string) (err error) {
	url := cmp.Or(os.Getenv("FASTZERO_JWKS_URL"), "http://localhost:9464/.well-known/jwks.json")
	verify, err := newVerifier(ctx, url, "fast-zero", "fast-zero")
	if err != nil {
		return err
	}
	for _, token := range tokens {
		claims, invalid := verify(token)
		if invalid != nil {
			err = errors.Join(err, fmt.Errorf("invalid token: %w", invalid))
			continue
		}
		fmt.Printf("user: %s\nsession: %s\n", claims.Subject, claims.Session)
	}
	return err
}

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
