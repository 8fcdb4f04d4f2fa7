-- The rows in the order in which the sweep has something to do with them: a row without content
-- stays for a day (in microseconds) longer than the content of one with it.
create index todo_trash_due_idx on todo_trash (
    (case when title is null then version + 86400000000 else version end)
);
