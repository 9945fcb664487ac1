"""One request at a time, in the order of arrival. The other pages show what they wait for."""

import contextlib
import queue
import threading
import traceback

from lib.errors import UserError, one_line


class Cancelled(Exception):
    """Raised within a request whose page is gone or asks for something else."""


class Job:
    """A request in the queue. `events` receives what its page should know; the last one has "done" or "error"."""

    def __init__(self, work):
        self.work, self.events, self.cancelled = work, queue.SimpleQueue(), threading.Event()
        self.status = "preparing"

    def say(self, **event):
        """Send an event to the page. Raises Cancelled if the page no longer wants it."""
        if self.cancelled.is_set():
            raise Cancelled
        self.status = event.get("status", self.status)
        self.events.put(event)

    def run(self):
        """Do the work; an error becomes the last event."""
        try:
            if not self.cancelled.is_set():
                self.work(self.say)
                self.say(done=True)
        except Cancelled:
            pass
        except UserError as problem:
            self.events.put(dict(error=" ".join(str(problem).split())))
        except Exception as problem:  # a bug: the page says so, and the next request gets its turn
            traceback.print_exc()
            what = f"{type(problem).__name__}: {one_line(problem, 200)}"
            self.events.put(dict(error=f"play.py failed ({what}). Its terminal shows where."))


class Turns:
    """The queue of requests. `run` works it off; the other methods may be called from any thread."""

    def __init__(self):
        self.arrived, self.jobs, self.lock = queue.SimpleQueue(), [], threading.Lock()

    def submit(self, work):
        """A new Job at the end of the queue. `work` is a function of its `say`."""
        job = Job(work)
        with self.lock:
            self.jobs.append(job)
        self.arrived.put(job)
        return job

    def waits_for(self, job):
        """What a waiting job waits for, a sentence; None if it is running or finished."""
        with self.lock:
            before = self.jobs[: self.jobs.index(job)] if job in self.jobs else []
        before = [other for other in before if not other.cancelled.is_set()]
        if not before:
            return None
        others = f", then {len(before) - 1} more" if len(before) > 1 else ""
        return f"Waiting for another page’s images ({before[0].status}){others}"

    def run(self):
        """Run jobs as they arrive, in the calling thread, until `stop`."""
        while True:
            with contextlib.suppress(queue.Empty):
                job = self.arrived.get(timeout=1)  # without a timeout, Ctrl-C would not interrupt it on Windows
                if job is None:
                    return
                try:
                    job.run()
                finally:
                    with self.lock:
                        self.jobs.remove(job)

    def stop(self):
        """End `run` after the jobs that have arrived."""
        self.arrived.put(None)
