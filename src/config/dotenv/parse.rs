//! The lines of a `.env` file, as compose reads them (compose-go, package `dotenv`).

use std::collections::HashMap;

use super::{
    error::{DotenvError, Problem},
    expand::expand,
};

/// Parses the lines, and returns the variables, each once, with the value of its last line.
/// `lookup` gives the variables of the environment, which precede those of the file. An invalid
/// line is skipped, unless its variable `is_read`.
pub(super) fn parse(
    text: &str,
    lookup: impl Fn(&str) -> Option<String>,
    is_read: impl Fn(&str) -> bool,
) -> Result<HashMap<String, String>, DotenvError> {
    let mut variables = HashMap::new();
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    loop {
        let start = skip_comments(rest);
        if start.is_empty() {
            return Ok(variables);
        }
        match parse_statement(start, &lookup, &variables) {
            Ok((name, value, after)) => {
                if let Some(value) = value {
                    variables.insert(name.to_owned(), value);
                }
                rest = after;
            }
            Err(problem) => {
                let (name, _) = split_name(skip_export(start));
                if is_read(name) {
                    let before = &text[..text.len() - start.len()];
                    let line = before.matches('\n').count() + 1;
                    return Err(DotenvError::Line { line, name: name.to_owned(), problem });
                }
                rest = split_line(start).1;
            }
        }
    }
}

/// Parses an assignment, and returns the name, the value, and the rest. A name without a value
/// stands for the variable of the environment, and has no value here.
fn parse_statement<'a>(
    start: &'a str,
    lookup: &impl Fn(&str) -> Option<String>,
    variables: &HashMap<String, String>,
) -> Result<(&'a str, Option<String>, &'a str), Problem> {
    let start = skip_export(start);
    let (name, after) = split_name(start);
    let after = after.trim_start_matches(is_blank);
    let Some(value) = after.strip_prefix(['=', ':']) else {
        let is_alone = after.is_empty() || after.starts_with('\n');
        return if is_alone && !name.is_empty() {
            Ok((name, None, after))
        } else {
            Err(Problem::Assignment)
        };
    };
    let lookup = |name: &str| lookup(name).or_else(|| variables.get(name).cloned());
    let value = value.trim_start_matches(is_blank);
    let (value, after) = if let Some(quote @ ('"' | '\'')) = value.chars().next() {
        let (value, after) = split_quoted(value, quote)?;
        match quote {
            '"' => (expand(&unescape(&value), &lookup)?, after),
            _ => (value, after),
        }
    } else {
        let (line, after) = split_line(value);
        let value = line.split_once(" #").map_or(line, |(value, _comment)| value);
        (expand(value.trim_end(), &lookup)?, after)
    };
    let is_text = !value.contains(['\0', char::REPLACEMENT_CHARACTER]);
    if is_text { Ok((name, Some(value), after)) } else { Err(Problem::Text) }
}

/// Splits a text after its quoted value. A backslash before the quote makes it a part of the value.
fn split_quoted(text: &str, quote: char) -> Result<(String, &str), Problem> {
    let mut value = String::new();
    let mut is_escaped = false;
    for (index, character) in text.char_indices().skip(1) {
        if character == quote && !is_escaped {
            let after = &text[index + 1..];
            let rest_of_line = split_line(after).0.trim();
            let is_end = rest_of_line.is_empty() || rest_of_line.starts_with('#');
            // More likely, the quote of the first line is not closed.
            let is_ambiguous = value.contains('\n') && !is_end;
            return if is_ambiguous { Err(Problem::Quote) } else { Ok((value, after)) };
        }
        if character == quote {
            value.pop();
        }
        is_escaped = character == '\\' && !is_escaped;
        value.push(character);
    }
    Err(Problem::Quote)
}

/// Replaces the escape sequences of a value in double quotes. The dollar sign of `\$` is doubled,
/// so that it does not begin a variable.
fn unescape(text: &str) -> String {
    let mut unescaped = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        unescaped.push_str(before);
        let mut characters = after.chars();
        let replacement = match characters.next() {
            Some('a') => "\x07",
            Some('b') => "\x08",
            Some('f') => "\x0c",
            Some('n') => "\n",
            Some('r') => "\r",
            Some('t') => "\t",
            Some('v') => "\x0b",
            Some('"') => "\"",
            Some('\\') => "\\",
            Some('$') => "$$",
            Some('0') => {
                rest = unescape_octal(characters.as_str(), &mut unescaped);
                continue;
            }
            _ => {
                unescaped.push('\\');
                rest = after;
                continue;
            }
        };
        unescaped.push_str(replacement);
        rest = characters.as_str();
    }
    unescaped.push_str(rest);
    unescaped
}

/// Replaces the digits after `\0` by their character, and returns the rest. Without three octal
/// digits, only the zero is dropped.
fn unescape_octal<'a>(after: &'a str, unescaped: &mut String) -> &'a str {
    let digits = after.get(..3).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
    if let Some(byte) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
        unescaped.push(char::from(byte));
        &after[3..]
    } else {
        unescaped.push('\\');
        after
    }
}

/// Skips blank lines and comments.
fn skip_comments(text: &str) -> &str {
    let mut rest = text.trim_start();
    while rest.starts_with('#') {
        rest = split_line(rest).1.trim_start();
    }
    rest
}

fn skip_export(text: &str) -> &str {
    match text.strip_prefix("export") {
        Some(rest) if rest.starts_with(is_blank) => {
            let rest = rest.trim_start_matches(is_blank);
            // A variable may have the name `export`.
            if rest.starts_with(['=', ':']) { text } else { rest }
        }
        _ => text,
    }
}

/// Splits a statement after the name of its variable, which may be empty.
fn split_name(start: &str) -> (&str, &str) {
    let is_name = |c: char| c.is_alphanumeric() || "_.-[]".contains(c);
    start.split_at(start.find(|c| !is_name(c)).unwrap_or(start.len()))
}

/// Splits a text after its first line, which loses its line break.
fn split_line(text: &str) -> (&str, &str) {
    text.split_once('\n').unwrap_or((text, ""))
}

/// Returns `true` for whitespace within a line.
fn is_blank(character: char) -> bool {
    character.is_whitespace() && character != '\n'
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const VARIABLE: &str = "TOKEN_ISSUER";

    fn parse_ours(text: &str) -> Result<HashMap<String, String>, DotenvError> {
        let environment = |name: &str| (name == "EXPORTED").then(|| "environment".to_owned());
        parse(text, environment, |name| name == VARIABLE)
    }

    /// The table that a test with containers compares with `docker compose config`.
    #[test]
    fn a_file_has_the_value_that_compose_gives_it() {
        let cases = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dotenv.json"));
        let cases: Vec<(String, Value)> = serde_json::from_str(cases).expect("a table");
        assert!(cases.len() > 100);
        for (text, expected) in cases {
            match (parse_ours(&text), expected) {
                (Ok(variables), Value::String(value)) => {
                    assert_eq!(variables.get(VARIABLE), Some(&value), "{text:?}");
                }
                (Ok(variables), Value::Null) => assert!(!variables.contains_key(VARIABLE)),
                (Err(_), Value::Bool(false)) => {}
                (parsed, expected) => panic!("{text:?}: {parsed:?}, not {expected}"),
            }
        }
    }

    #[test]
    fn lines_of_other_programs_are_skipped() {
        for other in [
            "no assignment",
            "=",
            "A B=c",
            "MOTD=Don't",
            "MOTD='Don't'",
            "MOTD=\"Don't",
            "A=${",
            "A=${B:?}",
            "A=${B",
            "A='",
            "\0",
            "\u{fffd}=1",
            "A=\u{fffd}",
            "[section]",
            "{\"TOKEN_ISSUER\": 1}",
            "export",
            "TOKEN_ISSUER_2",
            "X_TOKEN_ISSUER='",
            "TOKEN_ISSUER-2='",
        ] {
            for value in ["b", "'b'", "\"b\""] {
                let text = format!("{other}\n{VARIABLE}={value}\n");
                let variables =
                    parse_ours(&text).unwrap_or_else(|error| panic!("{other}: {error}"));
                assert_eq!(variables.get(VARIABLE).map(String::as_str), Some("b"), "{text}");
            }
        }
    }

    #[test]
    fn an_invalid_line_is_named_by_its_number() {
        for (line, problem) in [
            ("='hidden", Problem::Quote),
            ("=\"hidden", Problem::Quote),
            ("='hidden\n' hidden", Problem::Quote),
            (" hidden", Problem::Assignment),
            ("?=hidden", Problem::Assignment),
            ("=hidden${", Problem::Substitution),
            ("=${hidden", Problem::Substitution),
            ("=${HIDDEN:?hidden}", Problem::Required),
            ("=hidden\0", Problem::Text),
            ("=hidden\u{fffd}", Problem::Text),
        ] {
            for (before, number) in [("", 1), ("# a\r\n\r\nA='\n'\n export ", 5)] {
                let text = format!("{before}{VARIABLE}{line}");
                let error = parse_ours(&text).expect_err(&text).to_string();
                assert_eq!(error, format!(".env, line {number}: {VARIABLE} {problem}"));
                assert!(!error.contains("hidden"), "{error}");
            }
        }
    }
}
