-- A todo references the clock, and the clock the user: the deletion of a user then takes its locks
-- in the order of all other writes. Otherwise it and CreateTodo could wait for each other.
alter table todos
    drop constraint todos_owner_id_fkey,
    add constraint todos_clock_fkey
        foreign key (owner_id) references todo_clocks (owner_id) on delete cascade;
