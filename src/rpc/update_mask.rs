//! Update masks (AIP-134): the fields of a resource that an update changes.

use prost_types::FieldMask;

use crate::types::invalid::InvalidValue;

/// The read-only fields of a resource, with the fields of the messages among them: every path
/// that a mask of a whole resource may have besides the writable fields.
const READ_ONLY: [&str; 8] = [
    "id",
    "etag",
    "create_time",
    "create_time.seconds",
    "create_time.nanos",
    "update_time",
    "update_time.seconds",
    "update_time.nanos",
];

/// The fields that an update changes, at least one.
#[derive(Debug, PartialEq, Eq)]
pub struct UpdateMask(Vec<&'static str>);

impl UpdateMask {
    /// Parses the mask of an update.
    ///
    /// `writable` are the writable fields of the resource, each with whether the request sets
    /// it: without a mask, the update changes those. A mask may also name read-only fields, which
    /// are ignored (AIP-203).
    pub fn parse<const N: usize>(
        mask: Option<&FieldMask>,
        writable: [(&'static str, bool); N],
    ) -> Result<Self, InvalidValue> {
        let paths = mask.map_or(&[][..], |mask| &mask.paths);
        let names = || writable.iter().map(|(name, _)| *name);
        let list = || names().collect::<Vec<_>>().join(", ");
        if paths.is_empty() {
            let set: Vec<_> =
                writable.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
            if set.is_empty() {
                return Err(format!("must name a field where none is set: {}", list()).into());
            }
            return Ok(Self(set));
        }
        if paths == ["*"] {
            return Ok(Self(names().collect()));
        }
        let mut fields = Vec::new();
        for path in paths.iter().filter(|path| !READ_ONLY.contains(&path.as_str())) {
            match names().find(|name| name == path) {
                Some(name) => fields.push(name),
                None => return Err(format!("must consist of {}, or be * alone", list()).into()),
            }
        }
        if fields.is_empty() {
            return Err(format!("must name a field that is not read-only: {}", list()).into());
        }
        Ok(Self(fields))
    }

    /// Returns `true` if the update changes the field.
    #[must_use]
    pub fn contains(&self, field: &str) -> bool {
        self.0.contains(&field)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(paths: Option<&[&str]>) -> Result<UpdateMask, InvalidValue> {
        let mask =
            paths.map(|paths| FieldMask { paths: paths.iter().map(ToString::to_string).collect() });
        UpdateMask::parse(mask.as_ref(), [("title", true), ("state", false)])
    }

    #[test]
    fn an_update_without_a_mask_changes_the_fields_that_are_set() {
        assert_eq!(parse(None), Ok(UpdateMask(vec!["title"])));
        assert_eq!(parse(Some(&[])), Ok(UpdateMask(vec!["title"])));
        assert!(UpdateMask::parse(None, [("title", false)]).is_err());
    }

    #[test]
    fn a_mask_selects_the_fields_that_it_names() {
        assert_eq!(parse(Some(&["state"])), Ok(UpdateMask(vec!["state"])));
        assert_eq!(parse(Some(&["*"])), Ok(UpdateMask(vec!["title", "state"])));
        assert_eq!(parse(Some(&["id", "title"])), Ok(UpdateMask(vec!["title"])), "read-only");
        let all = [&["title"], &READ_ONLY[..]].concat();
        assert_eq!(parse(Some(&all)), Ok(UpdateMask(vec!["title"])), "read-only");
        let nested = ["etag.x", "create_time.", "create_time.x", "update_time.seconds.x"];
        for bad in nested {
            assert!(parse(Some(&["title", bad])).is_err(), "{bad:?}");
        }
        for bad in
            [&["id"][..], &READ_ONLY, &["*", "title"], &["title", ""], &["todo.title"], &["TITLE"]]
        {
            assert!(parse(Some(bad)).is_err(), "{bad:?}");
        }
    }

    /// Returns paths, some of them writable fields.
    fn paths() -> impl Strategy<Value = Vec<String>> {
        let path = prop_oneof![
            4 => Just("title".to_owned()),
            4 => Just("state".to_owned()),
            1 => Just("*".to_owned()),
            1 => "(title|state|id)[.,* ]?(title|TITLE)?",
            1 => any::<String>(),
        ];
        prop::collection::vec(path, 0..5)
    }

    proptest! {
        #[test]
        fn a_mask_is_valid_if_it_names_known_fields_and_a_writable_one(
            paths in paths(),
            set: (bool, bool),
        ) {
            let writable = [("title", set.0), ("state", set.1)];
            let named = |field: &str| paths.iter().any(|path| path == field);
            let expected: Vec<_> = writable
                .iter()
                .filter(|(name, set)| match &*paths {
                    [] => *set,
                    [all] if all == "*" => true,
                    _ => named(name),
                })
                .map(|(name, _)| *name)
                .collect();
            let is_unknown = |path: &&String| !["title", "state", "id"].contains(&path.as_str());
            let unknown = paths.iter().filter(is_unknown).count();
            let valid = !expected.is_empty() && (unknown == 0 || paths == ["*"]);

            match UpdateMask::parse(Some(&FieldMask { paths: paths.clone() }), writable) {
                Ok(mask) => {
                    prop_assert!(valid);
                    for (name, _) in writable {
                        prop_assert_eq!(mask.contains(name), expected.contains(&name));
                    }
                }
                Err(_) => prop_assert!(!valid),
            }
        }
    }
}
