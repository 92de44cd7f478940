"""The command line, which `python -m deploy.cli` runs too.

__main__         the entry: an interrupt is quiet from the first moment on
commands         `baton serve | generate | chat | status | completion`; flags of serve are made of the configuration
chat             a conversation over the OpenAI API (chat_client)
generation       one answer
status, report   the cluster as a table, live or as JSON
reference        writes docs/cli.md
"""
