#!/usr/bin/env python3
"""Prints the nginx.conf that ingress-nginx makes of k8s/components/ingress-nginx/ingress.yaml, for nodes on this machine.

  python3 scripts/ingress.py --listen 127.0.0.1:8080 --dir DIR 127.0.0.1:8110 127.0.0.1:8120 127.0.0.1:8130

Each directive stands behind the annotation that it comes from. What no annotation says is as the controller has it by default. An annotation
that is not known here is an error, so that nothing in the manifest is left out. DIR is for nginx's files, and must be there.
"""

import argparse
import os
import re

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MANIFEST = os.path.join(HERE, "k8s", "components", "ingress-nginx", "ingress.yaml")
PREFIX = "nginx.ingress.kubernetes.io/"
# For each annotation: the directive, and the text that the controller adds after the value.
DIRECTIVES = {
    "proxy-body-size": ("client_max_body_size", ""),
    "proxy-request-buffering": ("proxy_request_buffering", ""),
    "proxy-buffering": ("proxy_buffering", ""),
    "proxy-max-temp-file-size": ("proxy_max_temp_file_size", ""),
    "proxy-http-version": ("proxy_http_version", ""),
    "proxy-connect-timeout": ("proxy_connect_timeout", "s"),
    "proxy-read-timeout": ("proxy_read_timeout", "s"),
    "proxy-send-timeout": ("proxy_send_timeout", "s"),
    "proxy-next-upstream": ("proxy_next_upstream", ""),
    "proxy-next-upstream-tries": ("proxy_next_upstream_tries", ""),
    "proxy-next-upstream-timeout": ("proxy_next_upstream_timeout", ""),
}
# The part of the controller's template that concerns requests, with its default values. The controller's balancer (in Lua) skips pods that are not
# ready; here nginx skips a node for two seconds after a refused connection.
TEMPLATE = """\
worker_processes 2;
pid DIR/nginx.pid;
error_log stderr warn;
USER
events {
    worker_connections 16384;
}

http {
    access_log off;
    client_body_temp_path DIR/client-body;
    proxy_temp_path DIR/proxy;
    fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi;
    scgi_temp_path DIR/scgi;

    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    server_tokens off;
    reset_timedout_connection on;
    keepalive_timeout 75s;
    keepalive_requests 1000;
    client_header_buffer_size 1k;
    client_header_timeout 60s;
    large_client_header_buffers 4 8k;
    client_body_buffer_size 8k;
    client_body_timeout 60s;

    # An empty Connection header keeps connections to the nodes open.
    map $http_upgrade $connection_upgrade {
        default upgrade;
        '' '';
    }
    map $http_x_request_id $req_id {
        default $http_x_request_id;
        '' $request_id;
    }

    upstream upstream_balancer {
        zone upstream_balancer 64k;
SERVERS
        keepalive 320;
        keepalive_time 1h;
        keepalive_timeout 60s;
        keepalive_requests 10000;
    }

    server {
        listen LISTEN reuseport backlog=4096;

        location / {
            proxy_pass http://upstream_balancer;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header X-Request-ID $req_id;
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Forwarded-Port $server_port;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Scheme $scheme;
            proxy_set_header X-Scheme $scheme;
            proxy_set_header X-Original-Forwarded-For $http_x_forwarded_for;
            proxy_set_header X-Original-Forwarded-Host $http_x_forwarded_host;
            proxy_set_header Proxy "";
            proxy_buffer_size 4k;
            proxy_buffers 4 4k;
            proxy_cookie_domain off;
            proxy_cookie_path off;
            proxy_redirect off;

ANNOTATIONS
        }
    }
}
"""


def annotations(text):
    """The controller's annotations in the manifest's text, in their order, one per line."""
    found = re.findall(rf"^\s*{re.escape(PREFIX)}([a-z-]+): (.+?)\s*$", text, re.M)
    if len(found) != text.count(PREFIX):
        raise SystemExit(f"ingress: an annotation in {MANIFEST} is not NAME: VALUE on one line")
    return [(name, value.strip("\"'")) for name, value in found]


def config(manifest, listen, directory, nodes):
    """The text of nginx.conf."""
    lines = []
    for name, value in annotations(manifest):
        if name not in DIRECTIVES:
            raise SystemExit(f"ingress: the annotation {PREFIX}{name} is not known here; add what the controller makes of it to DIRECTIVES")
        directive, unit = DIRECTIVES[name]
        lines += [f"            # {PREFIX}{name}: {value}", f"            {directive} {value}{unit};"]
    servers = "\n".join(f"        server {node} max_fails=1 fail_timeout=2s;" for node in nodes)
    # If nginx runs as root, its workers would run as a user who cannot read the directory.
    user = "user root;\n" if os.geteuid() == 0 else ""
    parts = {"DIR": directory, "USER": user, "SERVERS": servers, "LISTEN": listen, "ANNOTATIONS": "\n".join(lines)}
    return re.sub("|".join(parts), lambda match: parts[match[0]], TEMPLATE)


def read_manifest():
    with open(MANIFEST) as file:
        return file.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", required=True, metavar="ADDRESS", help="where nginx listens")
    parser.add_argument("--dir", required=True, help="for its files")
    parser.add_argument("nodes", nargs="+", metavar="NODE", help="the public address of a node")
    arguments = parser.parse_args()
    print(config(read_manifest(), arguments.listen, arguments.dir, arguments.nodes), end="")


if __name__ == "__main__":
    main()
