"""A page to try a student on, and pictures over HTTP."""
