-- Locks out creations and updates by 0.1.0, whose statements name the column: without this, a todo
-- that it writes during the next steps would break them. Deletions by 0.1.0 do not name it: they
-- still work, and would leave no trace in the clock and in the trash. So all replicas of 0.1.0 are
-- stopped before.
alter table todos rename column updated_at to replaced_updated_at;
