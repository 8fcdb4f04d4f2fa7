-- The clock of an owner starts at the owner's latest change.
insert into todo_clocks (owner_id, version)
select owner_id, max(version) from todos group by owner_id;
