"""Everything on the main channel that is not RAM: the frame of the stream, commands, device state.

    reader      what all of this reads from: a stream, or bytes in memory
    sections    file header, configuration, section headers and footers, whose section is whose
    commands    what the source orders and what the destination answers
    fields      the kinds of fields, each with its exact bytes
    vmstate     descriptions made of fields: save and load of records, versions, subsections
    vmdesc      the JSON that tells what was sent; taking a recorded stream apart with it
    devices/    one description for each section of the machine, over plain records
    place       where a load or a save is, for messages
    remedies    what would let a destination take what it refuses

                      ┌ sections.encode_section_header ┐
    record ─▶ vmstate.save ─▶ bytes ───────────────────┴─▶ stream ─▶ sections.read_section_header
                      └─────▶ description ─▶ vmdesc.encode             SectionTable.bind ─▶ vmstate.load ─▶ record

Pure Python: device state is small (2 kB a vCPU) and passes once.  No thread, no socket, no hypervisor; every function
works on what it is given.

Holds (1) a peer's bytes raise StreamError or become a whole record, nothing between
      (2) device state has no length, so the footer is read right after each load, and tells whether both agreed
      (3) what is saved is, byte for byte and word for word of its description, what QEMU 10.0 would have written
"""
