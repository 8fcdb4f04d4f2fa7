//! The variables in a value: `$NAME`, `${NAME}` and the forms with a default, as compose expands
//! them.

use super::error::Problem;

/// Replaces the variables in a value. `$$` is a dollar sign, and so is `$` before anything that
/// is neither a name nor a brace.
pub(super) fn expand(
    text: &str,
    lookup: &impl Fn(&str) -> Option<String>,
) -> Result<String, Problem> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        rest = if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            after
        } else if after.starts_with('{') {
            let end = closing_brace(after).ok_or(Problem::Substitution)?;
            expanded.push_str(&expand_braced(&after[1..end], lookup)?);
            &after[end + 1..]
        } else {
            let (name, after) = split_name(after);
            match name {
                "" => expanded.push('$'),
                name => expanded.push_str(&lookup(name).unwrap_or_default()),
            }
            after
        };
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// Expands what is between the braces: a name, and maybe an operator and its operand.
fn expand_braced(text: &str, lookup: &impl Fn(&str) -> Option<String>) -> Result<String, Problem> {
    let (name, operation) = split_name(text);
    if name.is_empty() {
        return Err(Problem::Substitution);
    }
    let value = lookup(name);
    let (value_or_unset, operation) = match operation.strip_prefix(':') {
        // With a colon, an empty value counts as not set.
        Some(operation) => (value.filter(|value| !value.is_empty()), operation),
        None if operation.is_empty() => return Ok(value.unwrap_or_default()),
        None => (value, operation),
    };
    let mut characters = operation.chars();
    let operator = characters.next();
    let operand = expand(characters.as_str(), lookup)?;
    match (operator, value_or_unset) {
        (Some('-'), value) => Ok(value.unwrap_or(operand)),
        (Some('+'), value) => Ok(value.map_or_else(String::new, |_| operand)),
        (Some('?'), value) => value.ok_or(Problem::Required),
        _ => Err(Problem::Substitution),
    }
}

/// Returns the index of the brace that closes the first one.
fn closing_brace(text: &str) -> Option<usize> {
    let mut depth = 1;
    let mut previous = '{';
    for (index, character) in text.char_indices().skip(1) {
        match character {
            '{' if previous == '$' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
        previous = character;
    }
    None
}

/// Splits a text after the name of a variable, which may be empty.
fn split_name(text: &str) -> (&str, &str) {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return ("", text);
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    text.split_at(end.unwrap_or(text.len()))
}
