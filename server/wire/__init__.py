"""All that crosses a process: messages, split by who talks to whom, and the sockets they cross. No pickle."""
