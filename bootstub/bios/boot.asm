; The boot sector of the stub's floppy image: loads the stub and jumps to it.
;
; It saves the registers first, because a promoted disk is started with them, as the BIOS would.
; A read that fails is said and tried again, for ever: a console that stands still in silence is
; worse than one that complains.

bits 16
cpu 686
%include "memory.inc"
org BOOT_ADDR

        jmp     0:start                 ; some BIOSes come in as 07C0:0000
start:
        cli
        mov     [cs:ENTRY_SS], ss
        mov     [cs:ENTRY_SP], sp
        push    cs                      ; CS is 0
        pop     ss
        mov     sp, ENTRY_TOP
        pushad
        push    ds
        push    es
        push    fs
        push    gs
        mov     sp, STACK_TOP
        push    ss
        pop     ds
        push    ss
        pop     es
        sti
        cld

load:
        mov     bp, 3                   ; tries
.again:
        mov     ax, 0x0200 + STUB_SECTORS
        mov     bx, STUB_ADDR
        mov     cx, STUB_LBA + 1        ; cylinder 0; CHS counts sectors from 1
        mov     dh, 0
        mov     dl, [ENTRY_EDX]
        int     0x13
        jnc     .loaded
        mov     ah, 0                   ; reset the controller
        mov     dl, [ENTRY_EDX]
        int     0x13
        dec     bp
        jnz     .again
        mov     si, msg_unreadable
        jmp     .complain
.loaded:
        cmp     dword [STUB_ADDR], STUB_MAGIC
        je      STUB_ADDR + 4
        mov     si, msg_foreign
.complain:
        call    say
        mov     cx, 37                  ; about two seconds
.wait:
        hlt
        loop    .wait
        jmp     load

; Print a line on the screen and on the first serial port.
; In: SI NUL-terminated text.  Clobbers: AX, BX, CX, DX, SI.
say:
        lodsb
        test    al, al
        jz      .done
        push    ax
        mov     ah, 0x0E
        mov     bx, 7
        int     0x10
        pop     ax
        mov     dx, [BDA_COM1]
        test    dx, dx
        jz      say
        mov     ah, al
        add     dx, 5                   ; line status
        mov     cx, 2000                ; polls: a port that never empties is passed over
.poll:
        in      al, dx
        test    al, 0x20
        loopz   .poll
        jz      say
        sub     dx, 5
        mov     al, ah
        out     dx, al
        jmp     say
.done:
        ret

msg_unreadable:
        db      "vmirror-stub: the stub cannot be read from its floppy; trying again", 13, 10, 0
msg_foreign:
        db      "vmirror-stub: the stub's sectors hold something else; trying again", 13, 10, 0

%if $ - $$ > 510
%error the boot sector has outgrown its 512 bytes
%endif
        times   510 - ($ - $$) db 0
        dw      0xAA55
