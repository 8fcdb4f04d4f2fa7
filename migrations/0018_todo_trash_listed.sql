-- The deleted todos that are not purged, in the order of deletions. For lists of them, and for the
-- sweep: an owner can have many more tombstones.
create index todo_trash_listed_idx on todo_trash (owner_id, version) where title is not null;
