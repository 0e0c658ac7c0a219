"""The command line: one module for each command, and what they share.

Files, in the order in which to read them:

    cli.py         which commands there are, and how a command ends
    terminal.py    output, progress, and kinds of arguments
    texts.py       a text from an argument, a file or stdin
    generate.py    continue a text
    forms.py       what a text has to be, and what it was chosen from
    sessions.py    a text that is kept from one call to the next
    batch.py       continue many texts, a JSON object a line
    export.py      checkpoint to model directory
    info.py        what a model is, and what this machine offers
    models.py      the models that checkpoints were exported to by themselves
    quantize.py    model directory to a smaller one
    tokenize.py    text or dialog to ids
    detokenize.py  ids to text
    dialog/        talk with a model
    scoring/       how likely texts are; texts as vectors
    bench.py       speed
    perplexity.py  quality on a text
    verify.py      every kernel against its step in NumPy
    warmup.py      compile beforehand

A new command is a module here with NAME, SUMMARY, add_arguments(parser) and run(args, notes), and its place in
`cli.COMMANDS`.
"""
