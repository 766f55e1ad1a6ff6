"""What a monitor may ask of a migration: commands as plain data, plugged into whatever monitor the VMM has.

    command.py    Command, Argument, Event and their QAPI types; checks a client's arguments, says what is wrong
    schema.py     the same declarations as `query-qmp-schema` tells them
    types.py      the records of the migration commands
    qmp.py        the QMP commands of the migration surface, each a Command over one migration
    yank.py       how a migration's connections are broken

A monitor keeps a table of Commands by name, hands the client's arguments to `Command.call` and sends back what
comes out: a JSON value, or CommandError with QEMU's class and text.  Nothing here knows of sockets or JSON text.
"""
