-- The order of deletions, and of changes.
create unique index todo_trash_owner_version_key on todo_trash (owner_id, version);
