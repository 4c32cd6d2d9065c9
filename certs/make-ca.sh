#!/bin/sh
# Makes a throw-away certificate authority and one server certificate, for trying things out.
#
#   sh certs/make-ca.sh DIR NAME-or-IP...
#
# Writes DIR/ca.pem (what agents trust), DIR/cert.pem and DIR/key.pem (what Halfway serves). The authority's own key
# is forgotten at the end: nothing more can ever be signed with it.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: make-ca.sh DIR NAME-or-IP..." >&2
    exit 2
fi
dir=$1
shift

names=
for name in "$@"; do
    case $name in
    *:*) kind=IP ;;
    *[!0-9.]*) kind=DNS ;;
    *) kind=IP ;;
    esac
    names="$names${names:+,}$kind:$name"
done

umask 077
mkdir -p "$dir"
for file in ca.pem cert.pem key.pem; do
    if [ -e "$dir/$file" ]; then
        echo "make-ca.sh: $dir/$file is there already: remove it first, or name another directory" >&2
        exit 1
    fi
done
work=$(mktemp -d "$dir/.make-ca.XXXXXX")
trap 'rm -rf "$work"' EXIT

cat >"$work/ca.cnf" <<END
[req]
distinguished_name = name
prompt = no
x509_extensions = extensions
[name]
CN = Throw-away CA $(openssl rand -hex 4)
[extensions]
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
END
cat >"$work/cert.cnf" <<END
[req]
distinguished_name = name
prompt = no
[name]
CN = Halfway
[extensions]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = $names
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END

quietly() {
    "$@" 2>"$work/log" || {
        cat "$work/log" >&2
        exit 1
    }
}
new_key() {
    quietly openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"
}

new_key "$work/ca.key"
quietly openssl req -x509 -new -key "$work/ca.key" -config "$work/ca.cnf" -sha256 -days 397 -out "$work/ca.pem"
new_key "$work/key.pem"
quietly openssl req -new -key "$work/key.pem" -config "$work/cert.cnf" -out "$work/cert.csr"
quietly openssl x509 -req -in "$work/cert.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" \
    -set_serial "0x$(openssl rand -hex 16 | sed 's/^./4/')" \
    -extfile "$work/cert.cnf" -extensions extensions -sha256 -days 397 -out "$work/cert.pem"

chmod 644 "$work/ca.pem" "$work/cert.pem"
mv "$work/key.pem" "$work/cert.pem" "$work/ca.pem" "$dir/"
