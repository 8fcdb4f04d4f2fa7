//! Update masks (AIP-134): which fields of a resource an update changes.

use prost_types::FieldMask;

use crate::types::invalid::InvalidValue;

/// The fields that one update changes; at least one.
#[derive(Debug, PartialEq, Eq)]
pub struct Mask(Vec<&'static str>);

impl Mask {
    /// Finds what is to be changed. `writable` are the resource's writable fields,
    /// each with whether the request sets it: without a mask, those are meant.
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
                return Err(
                    format!("must name what to change where no field is set: {}", list()).into()
                );
            }
            return Ok(Self(set));
        }
        if paths == ["*"] {
            return Ok(Self(names().collect()));
        }
        let known = |path: &String| names().find(|name| name == path);
        let fields: Option<Vec<_>> = paths.iter().map(known).collect();
        fields.map(Self).ok_or_else(|| format!("must consist of {}, or be * alone", list()).into())
    }

    /// Whether the update changes this field.
    #[must_use]
    pub fn covers(&self, field: &str) -> bool {
        self.0.contains(&field)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(paths: Option<&[&str]>) -> Result<Mask, InvalidValue> {
        let mask =
            paths.map(|paths| FieldMask { paths: paths.iter().map(ToString::to_string).collect() });
        Mask::parse(mask.as_ref(), [("title", true), ("state", false)])
    }

    #[test]
    fn without_a_mask_the_fields_that_are_set_are_meant() {
        assert_eq!(parse(None), Ok(Mask(vec!["title"])));
        assert_eq!(parse(Some(&[])), Ok(Mask(vec!["title"])));
        assert!(Mask::parse(None, [("title", false)]).is_err());
    }

    #[test]
    fn a_mask_means_what_it_names() {
        assert_eq!(parse(Some(&["state"])), Ok(Mask(vec!["state"])));
        assert_eq!(parse(Some(&["*"])), Ok(Mask(vec!["title", "state"])));
        for bad in [&["id"][..], &["*", "title"], &["title", ""], &["todo.title"], &["TITLE"]] {
            assert!(parse(Some(bad)).is_err(), "{bad:?}");
        }
    }

    /// Paths of which some are writable fields.
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
        fn a_mask_is_taken_if_it_names_writable_fields_only(paths in paths(), set: (bool, bool)) {
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
            let stranger = |path: &&String| !["title", "state"].contains(&path.as_str());
            let strangers = paths.iter().filter(stranger).count();
            let good = !expected.is_empty() && (strangers == 0 || paths == ["*"]);

            match Mask::parse(Some(&FieldMask { paths: paths.clone() }), writable) {
                Ok(mask) => {
                    prop_assert!(good);
                    for (name, _) in writable {
                        prop_assert_eq!(mask.covers(name), expected.contains(&name));
                    }
                }
                Err(_) => prop_assert!(!good),
            }
        }
    }
}
