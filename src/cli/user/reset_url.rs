//! The URL of a page that takes a reset code.

use http::Uri;

/// What stands for the code.
const CODE: &str = "{code}";

/// The template of a URL that has the code in its fragment. A browser sends no fragment to a server
/// (RFC 9110, section 7.1), so the code reaches no log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ResetUrl(String);

impl ResetUrl {
    /// Parses a template, with `{code}` once in the fragment, or without a fragment.
    pub(super) fn parse(template: &str) -> Result<Self, &'static str> {
        let (page, fragment) = template.split_once('#').unwrap_or((template, CODE));
        let page_uri = page.parse::<Uri>().ok();
        let is_web = page_uri.is_some_and(|uri| {
            matches!(uri.scheme_str(), Some("https" | "http")) && uri.authority().is_some()
        });
        if !is_web {
            return Err("--url must be like https://example.com/reset#{code}");
        }
        let has_code_once = fragment.matches(CODE).count() == 1;
        if page.contains(CODE) || !has_code_once {
            return Err("--url must have {code} once, after the #");
        }
        if !fragment.chars().all(|char| char.is_ascii_graphic()) {
            return Err("--url must have no spaces, and no characters but those of ASCII");
        }
        Ok(Self(format!("{page}#{fragment}")))
    }

    /// Returns the URL of a code.
    pub(super) fn with_code(&self, code: &str) -> String {
        self.0.replace(CODE, code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_in_the_fragment() {
        for (template, url) in [
            ("https://example.com/reset", "https://example.com/reset#fzr_1"),
            ("https://example.com/reset#{code}", "https://example.com/reset#fzr_1"),
            ("http://localhost:3000/?a=b", "http://localhost:3000/?a=b#fzr_1"),
            (
                "https://example.com/#/reset?code={code}&lang=de",
                "https://example.com/#/reset?code=fzr_1&lang=de",
            ),
        ] {
            assert_eq!(ResetUrl::parse(template).expect(template).with_code("fzr_1"), url);
        }
    }

    #[test]
    fn a_template_with_the_code_elsewhere_is_rejected() {
        for template in [
            "",
            "example.com/reset",
            "/reset#{code}",
            "mailto:a@example.com",
            "ftp://example.com/#{code}",
            "https://example.com/{code}",
            "https://example.com/?code={code}",
            "https://example.com/?code={code}#{code}",
            "https://example.com/#reset",
            "https://example.com/#",
            "https://example.com/#{code}{code}",
            "https://example.com/#a {code}",
            "https://example.com/#{code}\n",
        ] {
            assert!(ResetUrl::parse(template).is_err(), "{template}");
        }
    }
}
