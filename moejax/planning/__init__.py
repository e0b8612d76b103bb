"""What a compiled program will need where it runs: memory, time and communication, read from the program itself.

`topology` gives devices to compile for, `program` reads the compiler's scheduled text, `arithmetic` and `links` say what an instruction
costs on a chip of `chips`, `timeline` walks the schedule, `report` writes it down.
"""
