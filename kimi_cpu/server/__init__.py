"""OpenAI's and Anthropic's APIs over one model: Starlette above, one inference thread below.

    app.py        routes, errors, start and stop
    security.py   who may ask: API key, Host, Origin
    bodies.py     how much all requests together may hold
    sse.py        streams that outlive slow prompts and notice clients that leave
    api/          one file an endpoint: what comes in, what goes out
    page/         the chat page: plain files, served by api/page.py
    ceiling.py    what the machine's memory allows a reply
    prompts.py    conversation -> token ids; replay.py finds the model's own tokens again,
                  replyfiles.py those of before a restart
    stored.py     responses that later requests go on from
    promptlog.py  the text of prompts and replies, for operators who ask for it
    worker.py     the inference thread: loads the model, runs the scheduler
    scheduler.py  whose turn it is: slices of prompts, then one token for every reply
    jobs.py       one unit of work, and how its results reach the event loop

What stays computed between requests is kimi_cpu/prefixes.

The inference thread alone touches the engine; the event loop alone touches requests; jobs are the
only thing that both know.
"""
