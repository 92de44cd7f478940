"""The live page at `/` on the HTTP port, and the data that it draws.

live_page  composes all below
routes     the page's files, the stream `/live`, and `/live/snapshot` for scripts
feed       one frame a tick for all who look; nothing where nobody does
overview   what a frame holds, gathered from all below and from `router.timeline`
pulse      rates and latencies of the last seconds
roster     workers that are gone, for a while
static     HTML, style and script, served as they are
"""
