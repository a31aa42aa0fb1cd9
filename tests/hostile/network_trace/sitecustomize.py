"""On PYTHONPATH, this writes every network event of a Python process to the file $NETWORK_TRACE, one JSON line each."""

import json
import os
import sys

KINDS = ("socket", "http", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "telnetlib", "webbrowser")

if os.environ.get("NETWORK_TRACE"):
    trace = os.open(os.environ["NETWORK_TRACE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write_event(event, arguments):
        if event.partition(".")[0] not in KINDS:
            return
        frame, files = sys._getframe(1), []
        while frame:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        line = {"event": event, "arguments": [repr(argument)[:200] for argument in arguments], "files": files}
        os.write(trace, json.dumps(line).encode() + b"\n")

    sys.addaudithook(write_event)
